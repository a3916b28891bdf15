"""``acip-export serve``."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from acip_export.artifacts.export_directory import load_export_plan
from acip_export.cli import output as console
from acip_export.cli.options import Debug, Json, Quiet
from acip_export.formats.registry import export_format
from acip_export.io.processes import module_environment


def serve(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export directory.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Its port.", min=1, max=65535)] = 8080,
    program: Annotated[
        str | None,
        typer.Option("--program", metavar="PATH", help="The server to start. Default: llama-server, as it is found."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and start nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve an export over HTTP: start its runtime's own server with the plan's settings.

    acip-export serve export/gguf-4GB

    acip-export serve export/gguf-4GB --port 9000 --dry-run

    GGUF: the llama-server on the path, else the same server inside xllamacpp, with the plan's context, prompt batch and
    cache type, one conversation at a time, and without the copies of earlier ones that it keeps by default. It answers
    POST /v1/chat/completions as OpenAI's clients ask. onnxruntime-genai has no server.
    """
    plan = load_export_plan(export)
    command = export_format(plan.format).server(plan, export, host, port, program)
    if json:
        console.print_json({"command": list(command)})
    elif dry_run:
        console.out.print(shlex.join(command), markup=False, soft_wrap=True)
    if dry_run or json:
        return
    console.note(shlex.join(command))
    console.note(f"http://{host}:{port}  (Ctrl-C ends)")
    sys.stdout.flush()
    if os.name == "nt":
        raise typer.Exit(subprocess.call(command, env=module_environment()))
    os.execve(command[0], command, module_environment())
