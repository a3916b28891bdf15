"""The command that serves a GGUF export over HTTP: llama.cpp's own server with the plan's settings."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from acip_export.artifacts.plan import Plan
from acip_export.errors import MissingExtraError, UnsupportedError
from converters.gguf.run_commands import server
from converters.gguf.runtimes.c_api import names_factor_pairs

PROGRAM = "llama-server"
_PACKAGED = "converters.gguf.runtimes.serve"


def server_command(plan: Plan, export: Path, host: str, port: int, program: str | None) -> tuple[str, ...]:
    """Return it: ``program``, else the llama-server on the path, else the same server inside xllamacpp.

    Raises:
        UnsupportedError: the server does not run factor pairs, or ``program`` is not there.
        MissingExtraError: there is none.
    """
    found = shutil.which(program or PROGRAM)
    if program is not None and found is None:
        raise UnsupportedError(f"{program} is no program that can be started; name the llama-server that you built")
    if plan.layout == "factored" and (found is None or not _runs_factor_pairs(Path(found))):
        raise UnsupportedError(
            f"{found or 'a llama-server'} does not run factor pairs. In a checkout of llama.cpp:\n"
            "  python -m converters.gguf.llama_cpp.extension PATH && cmake -B build && cmake --build build\n"
            f"and then  acip-export serve {export} --program PATH/build/bin/llama-server"
        )
    if found is not None:
        return (*server(plan, export, found), "--host", host, "--port", str(port))
    if plan.task != "causal" or find_spec("xllamacpp") is None:
        package = "llama-server" if plan.task != "causal" else "llama-server, or xllamacpp, which has it inside,"
        install = "a package of your system, or https://github.com/ggml-org/llama.cpp/releases"
        command = install if plan.task != "causal" else f"pip install 'acip-export[gguf]',  or {install}"
        raise MissingExtraError(package, "gguf", "serving this export", command)
    return (sys.executable, "-P", "-m", _PACKAGED, str(export), host, str(port))


def _runs_factor_pairs(program: Path) -> bool:
    """Whether it, or a library beside it, knows the names of factors."""
    folder = program.resolve().parent
    libraries = [*folder.glob("*llama*.*"), *folder.parent.glob("lib*/*llama*.*")]
    return names_factor_pairs([program, *(file for file in libraries if file.is_file())])
