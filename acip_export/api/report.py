"""The page and the card of an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from acip_export.api.opening import Location, another_model, open_model, open_scores
from acip_export.artifacts.export_directory import export_of
from acip_export.artifacts.names import PAGE_FILE
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import CheckpointError, InputError, ScoreFileError
from acip_export.io.inputs import read_input
from acip_export.model.checkpoint import Checkpoint
from acip_export.report import Exported, Ranking, build_page, write_papers
from acip_export.report.origin import hub_id, license_of
from acip_export.report.page import ScoreMap, embedded, read_export


def ranked_model_of(
    plan: Plan, model: Location | Checkpoint, scores: Location | ScoreFile | None
) -> tuple[Checkpoint | None, ScoreFile | None]:
    """The model and score file that ``plan`` was made from; ``None`` where the working directory happens not to be it.

    Raises:
        CheckpointError, ScoreFileError: a model or a score file was named, and is not of the plan's model.
    """
    named = model != "." or scores is not None
    if not named and not Path("config.json").is_file():
        return None, None
    try:
        checkpoint = open_model(model)
        if checkpoint.fingerprint != plan.model_fingerprint:
            raise another_model(checkpoint, plan)
        opened = open_scores(checkpoint, scores)
        opened.check_model(checkpoint)
    except (CheckpointError, ScoreFileError):
        if named:
            raise
        return None, None
    return checkpoint, opened


def write_report(
    export: Path,
    checkpoint: Checkpoint | None = None,
    scores: ScoreFile | None = None,
    others: Sequence[Path] = (),
    sizes: Sequence[Plan] = (),
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``README.md`` of an export from its ``plan.json`` and ``report.json``.

    Args:
        checkpoint, scores: of its model; without them, what an earlier ``report.html`` there says is kept.
        others: exports of the same model, format and layout, whose measured figures are shown too.

    Raises:
        PlanFileError, InputError: a plan or report is damaged, or of something else.
    """
    root = export_of(export)
    earlier = root / PAGE_FILE
    before = embedded(read_input(earlier, InputError).decode("utf-8", "replace")) if earlier.is_file() else None
    found: list[Exported] = [read_export(path) for path in (root, *others)]
    page = build_page(
        found[0],
        found[1:],
        sizes,
        None if scores is None else ranking_facts(scores, checkpoint),
        None if scores is None else score_map(scores),
        before,
    )
    return write_papers(page, root)


def ranking_facts(scores: ScoreFile, checkpoint: Checkpoint | None) -> Ranking:
    return Ranking(
        algorithm=scores.algorithm,
        data=scores.data,
        versions=scores.versions,
        curve=tuple((point.ratio, point.loss, point.loss_with_adapters) for point in scores.curve),
        license=license_of(checkpoint.path) if checkpoint else "",
        hub=hub_id(checkpoint.path) if checkpoint else "",
    )


def score_map(scores: ScoreFile) -> ScoreMap:
    units = {name: len(module.scores) for name, module in scores.modules.items()}

    def shares(ratios: Sequence[float]) -> list[dict[str, float]]:
        cuts = [scores.ranks_at(ratio) for ratio in ratios]
        return [{name: rank / units[name] for name, rank in ranks.items()} for ranks in cuts]

    return shares
