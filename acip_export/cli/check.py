"""``acip-export check``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from acip_export.check.config import find_config, load_config
from acip_export.check.markdown import COMMENT_KIND, markdown, summary
from acip_export.check.outputs import JUNIT_KIND, check_json, github_annotations, junit
from acip_export.check.run import files_read, run_check, update_lock
from acip_export.cli import output as console
from acip_export.cli.options import Debug, Json, Quiet
from acip_export.cli.project import PROJECT_FILE, load_project
from acip_export.cli.tables.check import show_check
from acip_export.errors import UsageError, VerificationError
from acip_export.io.outputs import Output, claim_output


def check(
    context_: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", help="Default: ./acip-check.toml, or ./pyproject.toml.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Baseline instead of the lock file: lock file, report, directory or model."),
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the lock file from what is there.")] = False,
    markdown_to: Annotated[
        str | None, typer.Option("--markdown", metavar="FILE", help="Comment for a pull request; - is stdout.")
    ] = None,
    junit_to: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="JUnit XML.")] = None,
    json: Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every tensor that changed.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fail when a model has grown or become worse than agreed, and say which tensors did it.

    acip-export check --update

    acip-export check --markdown comment.md --junit check.xml
    """
    if update and against is not None:
        raise UsageError("--update writes the lock file from what is there; it cannot be used with --against")
    if json and markdown_to == "-":
        raise UsageError("--json and --markdown - would both write to stdout; give --markdown a file")
    file = config or find_config(Path())
    group = context_.find_root().command
    loaded = load_config(file, lambda name: load_project(file.parent / PROJECT_FILE, group).place_of(name))
    comment_to = Path(markdown_to) if markdown_to not in (None, "-") else None
    read = [*files_read(loaded), loaded.lock, against]
    # Reports are made anew by every run, so an older one is replaced.
    comment_file = claim_output(comment_to, COMMENT_KIND, True, read, loaded.root) if comment_to else None
    junit_file = claim_output(junit_to, JUNIT_KIND, True, [*read, comment_to], loaded.root) if junit_to else None
    outcome = update_lock(loaded) if update else run_check(loaded, against)
    if comment_file is not None:
        _write(comment_file, markdown(outcome))
    if junit_file is not None:
        _write(junit_file, junit(outcome))
    if json:
        console.print_json(check_json(outcome))
    elif markdown_to == "-":
        console.out.out(markdown(outcome), end="", highlight=False)
    else:
        show_check(outcome, summary(outcome), verbose)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in github_annotations(outcome):
            console.annotate(line)
    if update:
        console.note(f"baseline written to {loaded.lock}; commit it")
    if not outcome.passed:
        raise VerificationError(f"{summary(outcome)}: {', '.join(result.name for result in outcome.failed)}")


def _write(output: Output, text: str) -> None:
    with output.new_file() as temporary:
        temporary.write_text(text, encoding="utf-8")
