"""Two processes on one output: the second is told which is the first, and nothing of either is harmed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from acip_export.artifacts.export_directory import EXPORT_KIND
from acip_export.artifacts.scores import SCORES_KIND
from acip_export.errors import OutputError, UsageError
from acip_export.io.locks import held
from acip_export.io.outputs import claim_output
from acip_export.io.processes import module_environment
from tests.support import Run, make_model, make_scores

HOLD = """
import sys, pathlib
from acip_export.io.locks import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", "-c", HOLD, str(place)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=module_environment(), **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"held\n"
        yield process
        process.stdin.close()
        process.wait()


def test_the_other_is_named(tmp_path: Path) -> None:
    place = tmp_path / "a" / "x.acip"
    place.parent.mkdir()
    with another(place) as process:
        for attempt in (lambda: held(place).__enter__(), lambda: claim_output(place, SCORES_KIND)):
            with pytest.raises(UsageError, match=f"another acip-export .process {process.pid} on .*, since 2"):
                attempt()
    claim_output(place, SCORES_KIND)
    assert list(place.parent.iterdir()) == []


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    place = tmp_path / "x.acip"
    with another(place) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claim_output(place, SCORES_KIND).new_file() as file:
            file.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == [place]


def test_one_process_may_hold_it_twice(tmp_path: Path) -> None:
    place = tmp_path / "x.acip"
    with held(place):
        with held(place), claim_output(place, SCORES_KIND).new_file():
            pass
        assert (tmp_path / ".x.acip.lock").exists()
    assert list(tmp_path.iterdir()) == [place]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".out.lock").symlink_to("precious")
    with pytest.raises(OutputError, match="out cannot be written"), held(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_long_name(tmp_path: Path) -> None:
    with held(tmp_path / ("x" * 250)):
        assert len(list(tmp_path.iterdir())) == 1


def test_commands(tmp_path: Path, run: Run) -> None:
    model = make_model(tmp_path / "model", hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    make_scores(model)
    out = tmp_path / "out"
    export = ("--model", model, "--budget", "50MB", "--format", "gguf", "--no-verify", "-o", out)
    (tmp_path / "text").write_text("words", encoding="utf-8")
    rank = ("rank", model, "--data", tmp_path / "text", "--algorithm", "magnitude", "-o", out)
    with another(out):
        for command in (export, rank):
            done = run(*command)
            assert done.code == 2
            assert "is being written by another acip-export (process" in " ".join(done.err.split())
    assert run(*export).code == 0


def test_an_interruption_while_it_is_taken_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the moment in which the file is there, and nothing else knows of it."""
    place, opened = tmp_path / "x.acip", os.open

    def pressed(*arguments: Any) -> int:
        descriptor = opened(*arguments)
        signal.raise_signal(signal.SIGINT)
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", pressed)
        with pytest.raises(KeyboardInterrupt), held(place):
            pytest.fail("it went on")
    assert list(tmp_path.iterdir()) == []
    with held(place) as first:
        assert first
        with held(place) as second:
            assert not second


def leave(place: Path) -> list[Path]:
    """What processes that were killed leave beside a place."""
    left = [place.parent / f".{place.name}.{digit * 8}{suffix}" for digit, suffix in zip("0af", _LEFT, strict=True)]
    for directory in left[:2]:
        directory.mkdir()
        (directory / "part").write_text("made")
    left[2].write_text("half a file")
    return left


_LEFT = (".tmp", ".old", ".tmp")


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    place = tmp_path / "export"
    place.mkdir()
    leave(place)
    others = [tmp_path / name for name in (".export.notes.tmp", ".export2.00000000.tmp", "export.00000000.tmp")]
    for other in others:
        other.mkdir()
    with claim_output(place, EXPORT_KIND).new_directory() as directory:
        (directory / "new").write_text("made")
    assert sorted(tmp_path.iterdir()) == sorted([place, *others])


def test_what_a_process_killed_between_two_renames_has_moved_is_back(tmp_path: Path) -> None:
    place = tmp_path / "export"
    moved = leave(place)[1]
    output = claim_output(place, EXPORT_KIND)
    with pytest.raises(UsageError, match=r"holds .*/export/part"), output.held():
        pytest.fail("it is replaced")
    assert not moved.exists()
    assert (place / "part").read_text() == "made"
