"""``acip-export build``."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from shlex import join
from typing import Annotated

import typer

from acip_export.cli import output as console
from acip_export.cli.export import prepare
from acip_export.cli.options import OUTPUT, Debug, Force, Json, Quiet, Verbose
from acip_export.cli.project import PROJECT_FILE, load_project


def build(
    context_: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAMES]", help="Default: all of them.")] = None,
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE", help=f"Default: ./{PROJECT_FILE}.", rich_help_panel=OUTPUT)
    ] = Path(PROJECT_FILE),
    list_: Annotated[
        bool, typer.Option("--list", help="Print what would be run instead.", rich_help_panel=OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plans, export nothing.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    force: Force = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make the exports that acip-export.toml names.

    acip-export build phone

    acip-export build --list

    acip-export build --force
    """
    group = context_.find_root().command
    project = load_project(config, group)
    chosen = project.choose(names or [])
    if list_:
        commands = {each.name: ["acip-export", *each.arguments] for each in chosen}
        if json:
            console.print_json(commands)
            return
        for name, command in commands.items():
            console.show_command(f"{name}: {join(command)}", shell=False)
        return
    of_the_call = {"--dry-run": dry_run, "--json": json, "--force": force, "--verbose": verbose}
    given = [flag for flag, is_given in of_the_call.items() if is_given]
    with chdir(project.file.parent), console.collected_json() as documents:
        jobs = []
        for each in chosen:  # All of them, before the first one takes its hour.
            with each.named():
                jobs.append(group.make_context("acip-export", [*each.arguments, *given], obj=context_.obj))
                prepare(jobs[-1].params)
        for each, job in zip(chosen, jobs, strict=True):
            if not json:
                console.say(each.name, style="bold")
            with each.named(), job:
                group.invoke(job)
    if json:
        console.print_json(dict(zip((each.name for each in chosen), documents, strict=True)))
