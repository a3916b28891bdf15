"""llama-cpp-python with our extension, built from its source package: ``python -m converters.gguf.llama_cpp.build``.

The wheel is kept outside any checkout, under ``$XDG_CACHE_HOME/acip-export`` (``~/.cache``), filed under everything
that could make it another one: version, additions, interpreter and processor. The first build takes 5 to 15 minutes on
two cores; after that, installing takes seconds. Needs a C++ compiler; CMake and Ninja come with pip.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from acip_export.errors import AcipError, ExtensionError
from acip_export.io.atomic import new_directory, user_cache
from converters.gguf.llama_cpp.extension import apply_extension, extension_hash

# The version whose places the extension's tests know; constraints.txt names the same.
VERSION = "0.3.36"
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
_CMAKE = {
    "LLAVA_BUILD": "OFF",  # images: not ours to change
    "GGML_NATIVE": "ON",  # for the processor it is built on, as the cache is
}
# Virtual machines and sandboxes announce AMX, grant it, and fault at the first tile. ggml asks for this macro.
_CMAKE |= {} if sys.platform == "win32" else dict.fromkeys(("CMAKE_C_FLAGS", "CMAKE_CXX_FLAGS"), "-U__AMX_INT8__")
# What no Python binding calls takes a third of the build; the source package asks for it all the same.
_UNUSED = 'set(LLAMA_BUILD_COMMON ON CACHE BOOL "Build llama.cpp common library" FORCE)'

Log = Callable[[str], None]


def cache_directory() -> Path:
    """Where the wheel for this machine is kept; it need not exist."""
    return user_cache() / "llama-cpp" / f"{VERSION}-{extension_hash()}-{_machine()}"


def wheel(log: Log) -> Path:
    """The wheel of the extended llama-cpp-python, built if it is not in the cache.

    Raises:
        ExtensionError: the source package cannot be had, has changed, or does not build; the log is quoted.
    """
    found = _cached()
    if found is not None:
        log(f"built before: {found}")
        return found
    with tempfile.TemporaryDirectory(prefix="acip-llama-cpp-") as scratch, new_directory(cache_directory()) as finished:
        unpacked = sources(Path(scratch), log)
        apply_extension(unpacked)
        _leave_out(unpacked / "CMakeLists.txt")
        _mark_version(unpacked / "llama_cpp" / "__init__.py")
        log("building it (5 to 15 minutes on two cores)")
        settings = [word for key, value in _CMAKE.items() for word in ("-C", f"cmake.define.{key}={value}")]
        _run([*_PIP, "wheel", str(unpacked), "--no-deps", "-w", str(finished), *settings])
    found = _cached()
    assert found is not None  # pip reported success
    return found


def _cached() -> Path | None:
    return next(cache_directory().glob("*.whl"), None)


def _machine() -> str:
    """The interpreter's platform, and a few digits of the processor's abilities: the build uses all of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        abilities = platform.processor()
    else:
        abilities = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digits = hashlib.sha256(abilities.encode()).hexdigest()[:8]
    return f"{sys.platform}-{platform.machine()}-{digits}"


def sources(scratch: Path, log: Log) -> Path:
    """The unpacked source package, fetched into ``scratch``.

    Raises:
        ExtensionError: it cannot be had.
    """
    log(f"fetching the source package of llama-cpp-python {VERSION}")
    name = f"llama-cpp-python=={VERSION}"
    _run([*_PIP, "download", name, "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(scratch)])
    archive = next(scratch.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as stream:
        stream.extractall(scratch / "sources", filter="data")
    archive.unlink()
    return next((scratch / "sources").iterdir())


def _leave_out(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if text.count(_UNUSED) != 1:
        raise ExtensionError(f"{file} no longer has the line  {_UNUSED};  adapt converters/gguf/llama_cpp/build.py")
    file.write_text(text.replace(_UNUSED, _UNUSED.replace(" ON ", " OFF ")), encoding="utf-8")


def _mark_version(file: Path) -> None:
    """A local version, so that pip and every report tell this build from the stock one."""
    text = file.read_text(encoding="utf-8")
    line = f'__version__ = "{VERSION}"'
    if text.count(line) != 1:
        raise ExtensionError(f"{file} no longer has the line  {line};  adapt converters/gguf/llama_cpp/build.py")
    file.write_text(text.replace(line, f'__version__ = "{VERSION}+acip.{extension_hash()}"'), encoding="utf-8")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        tail = "\n".join(f"  {line}" for line in done.stdout.splitlines()[-30:])
        raise ExtensionError(f"{' '.join(command)}\nfailed with exit code {done.returncode}:\n{tail}")


def main(
    constraints: Annotated[Path | None, typer.Option("--constraint", "-c", help="Versions for what it needs.")] = None,
    install: Annotated[bool, typer.Option(help="Install it into this Python's environment.")] = True,
) -> None:
    """Build llama-cpp-python with factor pairs, once, and install it into this environment."""

    def log(line: str) -> None:
        typer.echo(line, err=True)

    try:
        built = wheel(log)
        if install:
            pinned = [] if constraints is None else ["-c", str(constraints)]
            _run([*_PIP, "install", str(built), *pinned])
    except AcipError as error:
        log(f"error: {error}")
        raise typer.Exit(error.exit_code) from None
    typer.echo(built)


if __name__ == "__main__":
    typer.run(main)
