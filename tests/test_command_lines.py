"""Every command line that the documentation tells people to type is one that its program takes; nothing is run."""

from __future__ import annotations

import argparse
import html
import importlib.metadata
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.gguf.llama_options import unknown_options

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    file.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "samples/**/*.md")
    for file in ROOT.glob(pattern)
    if "node_modules" not in file.parts and file.name not in ("LOG.md", "CHANGELOG.md")
)
# What cannot be asked here, and why.
NOT_CHECKED = {
    "adb": "a part of Android's SDK",
    "apt": "the system's",
    "cd": "of the shell",
    "cmake": "builds what is not here",
    "echo": "of the shell",
    "export": "of the shell",
    "git": "no Python package; the versions that it clones are checked",
    "node": "no Python package; samples/node is run by tests/gguf/test_samples.py",
    "npm": "no Python package",
    "ollama": "no Python package",
    "pre-commit": "not among the packages of the tests",
    "python build.py": "of onnxruntime-genai's sources",
    "python convert_hf_to_gguf.py": "of llama.cpp's sources",
    "python run.py": "the reader's own file",
}
_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:acip-export|llama-server|llama-cli|hf|torchrun|accelerate|make|python -m) [^`]*)`")


@dataclass(frozen=True)
class Line:
    """A command as it is typed: program first, without variables and redirections."""

    page: str
    words: tuple[str, ...]
    in_a_sentence: bool = False

    @property
    def program(self) -> str:
        """The name that decides how it is checked."""
        name = Path(self.words[0]).name
        if name not in ("python", "python3"):
            return name
        return "python -m" if self.words[1] == "-m" else f"python {self.words[1]}"


def _commands(page: str) -> Iterator[Line]:
    text = (ROOT / page).read_text(encoding="utf-8")
    typed = [
        (line.removeprefix("$ "), False)
        for block in _BLOCK.findall(text)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
    spans = _INLINE.findall(text.replace("\n", " "))
    typed += [(span, True) for span in spans if "…" not in span and "..." not in span]
    for line, in_a_sentence in typed:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                if words:
                    yield Line(page, tuple(words), in_a_sentence)
                words = []
            elif words or not re.match(r"sudo$|[A-Z_]+=", word):
                words.append(word)


def _typer(command: Any, line: Line) -> None:
    """Parse, down to the last command, without running: not even flags that act when they are read."""
    name, words = line.words[0], list(line.words[1:])
    while True:
        acting = {o for p in command.params if p.callback or p.is_eager for o in (*p.opts, *p.secondary_opts)}
        words = [word for word in words if word not in acting]
        context = command.make_context(name, words)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not rest:
            return
        found, inner, words = command.resolve_command(context, rest)
        assert inner is not None, found
        name, command = str(found), inner


def _ours(line: Line) -> None:
    from acip_export.cli.main import app

    _typer(typer.main.get_command(app), line)


def _hub(line: Line) -> None:
    from huggingface_hub.cli.hf import app

    _typer(app, line)


def _parser(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
    known, _ = parser.parse_known_args(words)
    ours = [word for word in _after_module(words) if word.startswith("-")]
    _, unknown = parser.parse_known_args([word for word in words if word not in ours])
    assert known is not None and unknown == []


def _after_module(words: tuple[str, ...]) -> tuple[str, ...]:
    """What the launched program gets."""
    return words[words.index("-m") + 2 :] if "-m" in words else ()


def _launched(line: Line, parser: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
    _parser(parser, words)
    assert words[words.index("-m") + 1] == "acip_export"
    _ours(Line(line.page, ("acip-export", *_after_module(words))))


def _torchrun(line: Line) -> None:
    from torch.distributed.run import get_args_parser

    _launched(line, get_args_parser(), line.words[1:])


def _accelerate(line: Line) -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    assert line.words[1] == "launch"
    if "-m" in line.words:
        _launched(line, launch.launch_command_parser(), line.words[2:])
    else:
        _parser(launch.launch_command_parser(), (*line.words[2:], "script.py"))


def _llama_cpp(line: Line) -> None:
    assert unknown_options(line.words) == []


def _module(line: Line) -> None:
    """There is one, and it names every flag."""
    name = line.words[2]
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, name
    source = Path(found.origin)
    text = source.read_text(encoding="utf-8")
    for flag in (word.partition("=")[0] for word in line.words[3:] if word.startswith("-")):
        if name != "venv" and flag != "-h":
            assert f'"{flag}"' in text, f"{name} has no {flag}"


def _pip(line: Line) -> None:
    """Extras are ours; a pinned version is the one that tests run."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert line.words[1] == "install"
    for package in line.words[2:]:
        ours = re.fullmatch(r"acip-export(?:\[([\w,]+)\])?", package)
        if ours is not None:
            assert set((ours[1] or "all").split(",")) <= set(extras)
        elif "==" in package:
            name, _, version = package.partition("==")
            assert importlib.metadata.version(name) == version


def _make(line: Line) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {word for word in line.words[1:] if "=" not in word} <= set(targets)


def _script(line: Line) -> None:
    """One of ours, beside its page or in a folder of the samples."""
    script = line.words[1]
    assert (ROOT / Path(line.page).parent / script).is_file() or list(ROOT.glob(f"samples/*/{script}"))


CHECKS: dict[str, Callable[[Line], None]] = {
    "acip-export": _ours,
    "hf": _hub,
    "torchrun": _torchrun,
    "accelerate": _accelerate,
    "llama-server": _llama_cpp,
    "llama-cli": _llama_cpp,
    "python -m": _module,
    "python serve.py": _script,
    "python modelfile.py": _script,
    "pip": _pip,
    "make": _make,
}


def problem_of(line: Line) -> str | None:
    """Why a line would not work."""
    program = line.program
    if program in NOT_CHECKED:
        return None
    if program not in CHECKS:
        return f"nothing checks {program!r}: add it to CHECKS, or to NOT_CHECKED with the reason"
    try:
        CHECKS[program](line)
    except typer.Exit:  # --help
        return None
    except (Exception, SystemExit) as error:
        if line.in_a_sentence and type(error).__name__ == "MissingParameter":
            return None  # a sentence about a command needs no arguments
        return f"{type(error).__name__} {error}"
    return None


@pytest.mark.parametrize("page", [page for page in PAGES if any(_commands(page))])
def test_programs_take_their_command_lines(page: str) -> None:
    wrong = [f"{shlex.join(line.words)}: {why}" for line in _commands(page) if (why := problem_of(line)) is not None]
    assert wrong == []


def test_what_is_right_passes_and_installs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed in ("acip-export --install-completion", "hf upload NAME export/gguf-4GB", "hf upload"):
        problem = problem_of(Line("README.md", tuple(typed.split())))
        assert (problem is None) == (typed != "hf upload"), problem
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_found() -> None:
    for typed in (
        "acip-export --bugdet 4GB",
        "acip-export plan --format gguf --budget",
        "acip-export exprot",
        "hf upload --to there",
        "llama-server --cash-ram 0",
        "torchrun --number 2 -m acip_export rank .",
        "python -m converters.gguf.llama_cpp.extension PATH --undo",
        "python -m acip_export.nothing",
        "pip install acip-export[everything]",
        "make coffee",
        "coffee",
    ):
        assert problem_of(Line("README.md", tuple(typed.split()))), typed


def test_what_is_not_checked_is_there() -> None:
    """The list has no reasons for programs that no page names."""
    named = {line.program for page in PAGES for line in _commands(page)}
    assert set(NOT_CHECKED) <= named


def test_the_recorded_session_is_of_commands_that_there_are() -> None:
    from tools.record_session import COMMANDS, SESSION

    shown = html.unescape("".join(re.findall(r"<text[^>]*>(.*?)</text>", SESSION.read_text(encoding="utf-8"))))
    shown = shown.replace("\xa0", " ")
    for command in COMMANDS:
        assert f"$ {command}" in shown
        assert problem_of(Line("README.md", tuple(shlex.split(command)))) is None
    assert "@font-face" not in SESSION.read_text(encoding="utf-8")


def test_sources_are_cloned_at_the_version_that_tests_run() -> None:
    version = importlib.metadata.version("onnxruntime-genai")
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for tag in re.findall(r"--branch v([\d.]+) \S*onnxruntime-genai", text):
            assert tag == version, page
