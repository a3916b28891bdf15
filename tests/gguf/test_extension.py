"""Our lines in a llama.cpp checkout: put in once, taken out again, and refused as a whole where a place has moved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from acip_export.errors import ExtensionError
from converters.gguf.llama_cpp import build as build_llama_cpp
from converters.gguf.llama_cpp.extension import ADDITIONS, Change, apply_extension, extension_hash

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The places of every addition, in the order of the table, with lines around them that look alike."""
    texts: dict[str, str] = {}
    for addition in ADDITIONS:
        spaced = addition.anchor.replace(" ", "   ")  # llama.cpp aligns columns
        texts.setdefault(addition.file, f"// {addition.anchor}\n")
        texts[addition.file] += f"{addition.scope}\n    before;\n    {spaced}\n    after;\n}}\n{addition.anchor}\n"
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def contents(checkout: Path) -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in checkout.rglob("*") if path.is_file()}


def test_applied_once_and_reverted(checkout: Path) -> None:
    before = contents(checkout)
    assert set(apply_extension(checkout, check=True).values()) == {Change.ADDED}
    assert contents(checkout) == before
    assert set(apply_extension(checkout).values()) == {Change.ADDED}
    after = contents(checkout)
    for addition in ADDITIONS:
        text = after[checkout / addition.file]
        assert text.count(addition.lines) == 1
        above, below = text.split(addition.lines)
        neighbour = below.split("\n")[0] if addition.before else above.rstrip("\n").split("\n")[-1]
        assert neighbour.split() == addition.anchor.split()
    assert set(apply_extension(checkout).values()) == {Change.NONE}
    assert contents(checkout) == after
    assert set(apply_extension(checkout, revert=True).values()) == {Change.REMOVED}
    assert contents(checkout) == before
    assert set(apply_extension(checkout, revert=True).values()) == {Change.NONE}


def test_a_half_done_checkout_is_completed(checkout: Path) -> None:
    apply_extension(checkout)
    whole = contents(checkout)
    first = checkout / ADDITIONS[0].file
    first.write_text(first.read_text(encoding="utf-8").replace(ADDITIONS[0].lines, ""), encoding="utf-8")
    found = apply_extension(checkout)
    assert [name for name, change in found.items() if change is Change.ADDED] == [ADDITIONS[0].file]
    assert contents(checkout) == whole


def test_the_sources_of_llama_cpp_python_are_found(checkout: Path, tmp_path: Path) -> None:
    package = tmp_path / "llama_cpp_python"
    (package / "vendor").mkdir(parents=True)
    (checkout / "src").rename(package / "vendor" / "src")
    (package / "vendor").rename(package / "llama.cpp")
    (package / "vendor").mkdir()
    (package / "llama.cpp").rename(package / "vendor" / "llama.cpp")
    assert set(apply_extension(package).values()) == {Change.ADDED}


@pytest.mark.parametrize("part", ["scope", "anchor"])
@pytest.mark.parametrize("index", range(len(ADDITIONS)))
def test_a_moved_place_stops_everything(index: int, part: str, checkout: Path) -> None:
    addition = ADDITIONS[index]
    file = checkout / addition.file
    text = file.read_text(encoding="utf-8")
    start = text.index(f"{addition.scope}\n")
    line = addition.scope if part == "scope" else f"    {addition.anchor.replace(' ', '   ')}"
    position = text.index(f"{line}\n", start)
    file.write_text(text[:position] + "elsewhere" + text[position + len(line) :], encoding="utf-8")
    before = contents(checkout)
    with pytest.raises(ExtensionError, match="Nothing was changed") as error:
        apply_extension(checkout)
    assert addition.file in str(error.value)
    assert addition.anchor in str(error.value)
    assert contents(checkout) == before


def test_a_scope_that_is_there_twice_is_refused(checkout: Path) -> None:
    file = checkout / ADDITIONS[0].file
    file.write_text(2 * file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ExtensionError, match="found 2 times, expected once"):
        apply_extension(checkout)


def test_something_else_than_a_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExtensionError, match=r"is no checkout of llama\.cpp"):
        apply_extension(tmp_path)


def test_the_command(checkout: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "converters.gguf.llama_cpp.extension", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    assert run(str(checkout), "--check").stdout.startswith("added      src/llama-model.h")
    assert run(str(checkout)).returncode == 0
    assert run(str(checkout), "--revert").stdout.startswith("removed")
    empty = tmp_path / "empty"
    empty.mkdir()
    failed = run(str(empty))
    assert failed.returncode == ExtensionError.exit_code
    assert "is no checkout" in failed.stderr


def test_the_build_is_of_the_pinned_version_and_of_these_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"llama-cpp-python=={build_llama_cpp.VERSION}" in pinned
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    directory = build_llama_cpp.cache_directory()
    assert directory.parent == Path("/cache/acip-export/llama-cpp")
    assert directory.name.startswith(f"{build_llama_cpp.VERSION}-{extension_hash()}-")


def test_a_built_wheel_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build_llama_cpp.cache_directory().mkdir(parents=True)
    built = build_llama_cpp.cache_directory() / "llama_cpp_python-0-py3-none-any.whl"
    built.touch()
    monkeypatch.setattr(build_llama_cpp, "_run", lambda command: pytest.fail(f"ran {command}"))
    log: list[str] = []
    assert build_llama_cpp.wheel(log.append) == built
    assert log == [f"built before: {built}"]


def test_a_failed_build_leaves_nothing_and_quotes_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failing = (sys.executable, "-c", "print('no such package'); raise SystemExit(1)")
    monkeypatch.setattr(build_llama_cpp, "_PIP", failing)
    with pytest.raises(ExtensionError, match=r"(?s)failed with exit code 1.*no such package"):
        build_llama_cpp.wheel(lambda _: None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not build_llama_cpp.cache_directory().exists()
