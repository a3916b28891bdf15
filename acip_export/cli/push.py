"""``acip-export push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from acip_export.cli import output as console
from acip_export.cli.options import CHECK, OUTPUT, Debug, Json, Quiet
from acip_export.cli.tables.common import plain_table
from acip_export.units import format_bytes

if TYPE_CHECKING:
    from acip_export.api import Publication

_CARD = "Model card"


def push(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export directory.")],
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="OWNER/NAME on the hub, or NAME for one of yours.")
    ],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be uploaded; no network, no token.", rich_help_panel=OUTPUT),
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Only its owners may see it.", rich_help_panel=OUTPUT)
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Default: main.", rich_help_panel=OUTPUT)
    ] = None,
    create_pr: Annotated[
        bool,
        typer.Option("--create-pr", help="Propose the files as a pull request.", rich_help_panel=OUTPUT),
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="OWNER/NAME",
            help="What it was made from, or none. Default: the card's.",
            rich_help_panel=_CARD,
        ),
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Its licence. Default: the card's.", rich_help_panel=_CARD),
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Publish what was not verified, too.", rich_help_panel=CHECK)
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Publish an export on a Hugging Face hub, with its model card: what was verified, byte by byte.

    acip-export push export/gguf-4GB OWNER/NAME --dry-run

    acip-export push export/gguf-4GB OWNER/NAME --private

    What the plan lists is uploaded, with card, plan, report and page, in one commit, and nothing else of the directory.
    The token is that of  hf auth login, or HF_TOKEN.
    """
    from acip_export import api as pipeline
    from acip_export.io.hub import check_repository_id, show_bars

    bars = console.err.is_terminal and not console.err.quiet
    if bars:
        show_bars()
    check_repository_id(repository)
    with console.stage_progress() as progress:
        published = pipeline.publication(export, base_model, license_, unverified, progress)
    asked = {"private": private, "revision": revision, "files": published.sizes, "bytes": sum(published.sizes.values())}
    if not json:
        _show(published, repository)
    if dry_run:
        if json:
            console.print_json({"repository": repository, **asked, "url": None, "commit": None, "pull_request": None})
        return
    if bars:  # the client's own, which know what of a file is there already
        made = pipeline.push_export(published, repository, private, revision, create_pr)
    else:
        with console.stage_progress() as progress:
            made = pipeline.push_export(published, repository, private, revision, create_pr, progress)
    if json:
        found = {"url": made.url, "commit": made.oid, "pull_request": made.pull_request}
        console.print_json({"repository": made.repository, **asked, **found})
    elif made.pull_request is not None:
        console.say(f"proposed:  {made.pull_request}")
    else:
        console.say(f"published:  {made.url}")


def _show(published: Publication, repository: str) -> None:
    table = plain_table("file", "", "bytes")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, nbytes in published.sizes.items():
        table.add_row(name, format_bytes(nbytes), f"{nbytes:,}")
    total = sum(published.sizes.values())
    table.add_row(f"to {repository}", format_bytes(total), f"{total:,}", style="bold")
    console.out.print(table)
