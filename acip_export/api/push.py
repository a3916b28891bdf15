"""Put an export on a Hugging Face hub: what was verified, with its card, and nothing else of its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from acip_export.artifacts.export_directory import load_export_plan
from acip_export.artifacts.names import CARD_FILE, MARK_FILE, PAGE_FILE, PLAN_FILE, REPORT_FILE
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.report import load_report
from acip_export.errors import InputError, VerificationError
from acip_export.io.atomic import sha256_of
from acip_export.io.hub import Commit, upload
from acip_export.io.inputs import read_input
from acip_export.progress import Progress, ProgressCallback, silent
from acip_export.report.card_fields import NO_BASE_MODEL, completed, fields_of, lacking_of
from acip_export.units import format_bytes
from acip_export.verification.export import check_bytes
from acip_export.version import __version__

# Of an export's papers, those that are for others. What a device needs is in the plan's list of files.
_PUBLISHED = (CARD_FILE, PLAN_FILE, REPORT_FILE, PAGE_FILE)


@dataclass(frozen=True)
class Publication:
    """An export as others get it.

    Attributes:
        files: their contents by name.
    """

    plan: Plan
    files: Mapping[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {
            name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in self.files.items()
        }


def publication(
    export: Path,
    base_model: str | None = None,
    license_: str | None = None,
    unverified: bool = False,
    progress: ProgressCallback = silent,
) -> Publication:
    """Check that an export can be published, and return what would be; nothing is uploaded.

    Args:
        base_model, license_: for the card, in place of what it says; :data:`NO_BASE_MODEL`: it names
            none.
        unverified: whether one that was not verified, or failed, may be published.

    Raises:
        PlanFileError: there is no plan. VerificationError: its files are not the plan's, or not those that were
            verified. InputError: the card is missing, or lacks what the hub needs.
    """
    plan = load_export_plan(export)
    failures = check_bytes(export, plan)
    if failures:
        raise VerificationError("\n".join([f"{export} is not what was planned, and is not published:", *failures]))
    if not unverified:
        _check_verified(export, plan, progress)
    card = _card(export, base_model, license_)
    papers: dict[str, Path | bytes] = {name: export / name for name in _PUBLISHED if (export / name).is_file()}
    if base_model is not None or license_ is not None:
        papers[CARD_FILE] = card.encode()
    return Publication(plan, {**papers, **{name: export / name for name in plan.files}})


def push_export(
    published: Publication,
    repository: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    progress: ProgressCallback = silent,
) -> Commit:
    """Upload it, in one commit. See :func:`acip_export.io.hub.upload`, which raises what this does."""
    plan = published.plan
    message = f"{plan.model} to {plan.format.upper()}, {format_bytes(plan.planned_bytes)}, by acip-export {__version__}"
    progress(Progress("upload", 0, None, format_bytes(sum(published.sizes.values()))))
    return upload(published.files, repository, message, private, revision, create_pr)


def _check_verified(export: Path, plan: Plan, progress: ProgressCallback) -> None:
    """Raise VerificationError unless these files, number by number, have passed."""
    command = f"acip-export verify {export}"
    remedy = f"Verify it with:  {command}\nOr publish it as it is:  --unverified"
    mark = export / MARK_FILE
    if mark.is_file():
        why = read_input(mark, InputError).decode("utf-8", "replace").partition("\n")[2].strip()
        known = why.removeprefix("Verify it with:").strip() if why.startswith("Verify it with:") else None
        if known is not None:
            remedy = remedy.replace(command, known)
        raise VerificationError(
            f"{export} is marked as unverified" + (f":\n{why}" if why and known is None else "") + f"\n{remedy}"
        )
    if not (export / REPORT_FILE).is_file():
        raise VerificationError(f"{export} was never verified: it has no {REPORT_FILE}\n{remedy}")
    report = load_report(export / REPORT_FILE)
    if not report.passed:
        raise VerificationError("\n".join([f"{export} failed its verification:", *report.failures, remedy]))
    verified = {file.name: file.sha256 for file in report.files}
    for index, name in enumerate(plan.files):
        progress(Progress("check", index, len(plan.files), name))
        if verified.get(name) != sha256_of(export / name):
            raise VerificationError(f"{export / name} is not the file that was verified\n{remedy}")


def _card(export: Path, base_model: str | None, license_: str | None) -> str:
    """The card's text, completed.

    Raises:
        InputError: there is none, it cannot be read, or the hub needs what it lacks.
    """
    file = export / CARD_FILE
    again = f"acip-export report {export}"
    data = read_input(file, InputError, missing=f"; make it with  {again}")
    text = completed(data.decode("utf-8", "replace"), str(file), base_model, license_)
    fields = fields_of(text, str(file))
    lacking = [each.why for each in lacking_of(fields, base_model != NO_BASE_MODEL)]
    lacking += [f"it has no {key}; write it again:  {again}" for key in ("library_name", "tags") if not fields.get(key)]
    if lacking:
        raise InputError("\n".join([f"the model card {file} is not what the hub needs:", *lacking]))
    return text


def flags_of_card(export: Path) -> list[str]:
    """Return the flags, and what stands for their values, that publishing an export takes as its card lacks them."""
    file = export / CARD_FILE
    try:
        fields = fields_of(read_input(file, InputError).decode("utf-8", "replace"), str(file))
    except InputError:  # publishing says what is wrong with it
        return []
    return [word for each in lacking_of(fields) for word in (each.flag, each.value)]
