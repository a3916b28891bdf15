"""Commands that are killed at random moments go on to the same bytes, and never leave an output in pieces.

``kill -9``, which nothing can catch, hits the real commands, in processes that have the libraries loaded already and
keep their states at once, not every 20 seconds. What a run has left is what the next one goes on from.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import acip_export
from acip_export.artifacts.plan import dumps_plan, load_plan
from acip_export.io.processes import module_environment
from tests.encoders import make_encoder
from tests.planning.problems import examples
from tests.ranking.support import calibration_text, sharp_model
from tests.support import CORPUS, everywhere, make_plan, make_scores

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")]

# Loads what takes seconds once, and runs a command in a copy of itself for every line that it reads.
_SERVER = """
import json, os, runpy, sys
import torch, transformers, safetensors.torch
torch.set_num_threads(1)
from acip_export.artifacts import cache
from acip_export.io import kept_states
from acip_export.verification import decoders, reference, unfinished
from acip_export.materialization import planned_model
from acip_export.measurement import classes, plans
from acip_export.ranking import stage
from acip_export import api
import acip_export.cli.main
stage.rank_model.__kwdefaults__["store_seconds"] = 0.0
kept_states._AT_MOST_LOST = kept_states._TIMES_WRITING = cache._AT_MOST_LOST = unfinished._WORTH_KEEPING = 0.0
print("ready", flush=True)
for line in sys.stdin:
    arguments, directory, log = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.chdir(directory)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.argv = ["acip-export", *arguments]
            runpy.run_module("acip_export", run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_KILLS = examples(2, 20)
_TYPES = {"gguf": "q8_0,q5_0,q4_0", "onnx": "int8,int4"}
# What says how long something took, and what is made from that.
_TIMED = {"report.json", "report.html", "README.md"}


class Server:
    """Runs commands, one at a time."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**module_environment(), "TMPDIR": str(log.parent), "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._ask, self._answers = self._process.stdin, self._process.stdout
        assert self._answers.readline() == "ready\n"

    def run(self, arguments: Sequence[object], directory: Path, killed_after: float | None = None) -> int:
        """Return how a command ended, negative for a signal: SIGKILL comes so many seconds after it began."""
        self._ask.write(json.dumps([[*map(str, arguments)], str(directory), str(self._log)]) + "\n")
        self._ask.flush()
        child = int(self._answers.readline())
        # The server has not waited for it as long as it has not answered: the number is still the child's.
        killer = threading.Timer(killed_after or 0.0, os.kill, (child, signal.SIGKILL))
        if killed_after is not None:
            killer.start()
        try:
            return int(self._answers.readline())
        finally:
            killer.cancel()

    @property
    def said(self) -> str:
        """The end of what commands have printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:] if self._log.exists() else ""

    def close(self) -> None:
        """End it."""
        self._ask.close()
        self._answers.close()
        assert self._process.wait(60) == 0


@dataclass(frozen=True)
class Stage:
    """A command, run in a directory of its own.

    Attributes:
        begin: fills that directory. arguments: of the command, by what is there. output: its name.
        check: whether what is there is whole, compared with the output of a run that was never killed.
        compared: what a finished run has to have alike, by name.
    """

    begin: Callable[[Path], None]
    arguments: Callable[[Path], Sequence[object]]
    output: str
    check: Callable[[Path, Path], None]
    compared: Callable[[Path], Mapping[str, object]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharp_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=4)


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    return calibration_text(model.parent / "text.txt", 20)


@pytest.fixture(scope="module")
def ranked(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model with its score file."""
    copy = Path(shutil.copytree(model, tmp_path_factory.mktemp("ranked") / "tiny"))
    acip_export.rank(copy, text, out=copy / "tiny.acip", algorithm="kfac", context=32)
    return copy


@pytest.fixture(scope="module")
def measured(ranked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that with what the types of each format cost."""
    copy = Path(shutil.copytree(ranked, tmp_path_factory.mktemp("measured") / "tiny"))
    for format, types in _TYPES.items():
        acip_export.plan(
            copy, budget="2MB", format=format, scope="file", types=types.split(","), context=32, calibrate=False
        )
    return copy


def test_a_ranking_without_training(server: Server, model: Path, text: Path, tmp_path: Path) -> None:
    command = ("rank", model, "--data", text, "--algorithm", "kfac", "--context", 32, "-o", "tiny.acip")

    def arguments(place: Path) -> Sequence[object]:
        return (*command, "--no-measure-rounding", *_force(place / "tiny.acip"))

    survives(Stage(_empty, arguments, "tiny.acip", _same_bytes, _files), server, tmp_path, 1)


def test_a_learned_ranking(server: Server, model: Path, text: Path, tmp_path: Path) -> None:
    settings = (
        "stop_ratio=0.6",
        "learning_rate=2e-3",
        "penalty=3e-2",
        "penalty_growth=1.5",
        "post_tune=4",
        "batch=2",
        "adapter_rank=4",
    )
    command = ("rank", model, "--data", text, "--algorithm", "acip", "--context", 32, "-o", "tiny.acip")
    command = (*command, "--no-measure-rounding")
    command = (*command, *(word for setting in settings for word in ("--set", setting)))

    def arguments(place: Path) -> Sequence[object]:
        resumed = ("--resume",) if (place / "tiny.acip.run").exists() else ()
        return (*command, *resumed, *_force(place / "tiny.acip"))

    survives(Stage(_empty, arguments, "tiny.acip", _same_bytes, _files), server, tmp_path, 2)


def test_a_plan_that_measures(server: Server, ranked: Path, tmp_path: Path) -> None:
    command = ("plan", "--model", "tiny", "--budget", "300kB", "--budget-scope", "file", "--format", "gguf")
    command = (*command, "--types", _TYPES["gguf"], "--context", 32, "--candidates", 3, "-o", "plan.json")

    def begin(place: Path) -> None:
        shutil.copytree(ranked, place / "tiny")

    def arguments(place: Path) -> Sequence[object]:
        return (*command, *_force(place / "plan.json"))

    survives(Stage(begin, arguments, "plan.json", _same_bytes, _files), server, tmp_path, 3)


@pytest.mark.parametrize("format", _TYPES)
def test_an_export(server: Server, measured: Path, tmp_path: Path, format: str) -> None:
    command = (*_export(measured, format), "-o", "out")

    def arguments(place: Path) -> Sequence[object]:
        return (*command, *_force(place / "out"))

    survives(Stage(_empty, arguments, "out", _whole_export, _files), server, tmp_path, 4)


def test_a_bundle(server: Server, ranked: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    decide = everywhere(representation="factored", rank=32, up_type="q4_0", down_type="q4_0", embedding_type="q8_0")
    plan.write_text(dumps_plan(replace(make_plan(ranked, "gguf", "factored", decide, 32), rounding="feedback")))
    command = ("materialize", plan, "--model", ranked, "-o", "bundle")

    def arguments(place: Path) -> Sequence[object]:
        return (*command, *_force(place / "bundle"))

    survives(Stage(_empty, arguments, "bundle", _same_files, _files), server, tmp_path, 7)


def test_an_export_with_its_bundle(server: Server, measured: Path, tmp_path: Path) -> None:
    command = (*_export(measured, "onnx"), "--no-verify", "--keep-bundle", "-o", "out")

    def arguments(place: Path) -> Sequence[object]:
        return (*command, *(_force(place / "out") or _force(place / "out-bundle")))

    survives(Stage(_empty, arguments, "out", _whole_export, _files), server, tmp_path, 8)


def test_several_budgets(server: Server, measured: Path, tmp_path: Path) -> None:
    """What was finished stays, and nothing of it is left out."""
    command = (*_export(measured, "gguf"), "--budget", "320kB", "--no-verify", "-o", "sizes")

    def arguments(place: Path) -> Sequence[object]:
        return (*command, *_force(place / "sizes"))

    first = "sizes/gguf-300kB"
    survives(Stage(_empty, arguments, first, _whole_export, _files), server, tmp_path, 9)


def test_a_verification(server: Server, measured: Path, text: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    assert server.run((*_export(measured, "gguf"), "--no-verify", "-o", "out"), made) == 0, server.said

    survives(_verifying(made, measured, text), server, tmp_path, 5)


def test_a_verification_of_an_encoder(server: Server, tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    make_scores(encoder)
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"{line.strip()} {index}\n" for index in range(60) for line in CORPUS[:2]), encoding="utf-8"
    )
    made = tmp_path / "made"
    made.mkdir()
    asked = ("--model", encoder, "--budget", "2MB", "--budget-scope", "file", "--format", "onnx", "--no-calibrate")
    assert server.run((*asked, "--accept-loss", "--no-verify", "-o", "out"), made) == 0, server.said

    survives(_verifying(made, encoder, text), server, tmp_path, 6)


def _verifying(made: Path, model: Path, text: Path) -> Stage:
    """Return the verification of the export in a copy of ``made``."""

    def begin(place: Path) -> None:
        shutil.copytree(made, place)

    def check(report: Path, expected: Path) -> None:
        assert _files(report.parent)["report.json"] == _files(expected.parent)["report.json"]
        _whole_export(report.parent, expected.parent)

    command = ("verify", "out", "--model", model, "--text", text)
    return Stage(begin, lambda _: command, "out/report.json", check, _files)


def _export(model: Path, format: str) -> tuple[object, ...]:
    asked = ("--model", model, "--budget", "300kB", "--budget-scope", "file", "--format", format, "--context", 32)
    return (*asked, "--types", _TYPES[format], "--no-calibrate", "--accept-loss")


def survives(stage: Stage, server: Server, tmp_path: Path, seed: int) -> None:
    """Kill a stage at random moments, let it end, and compare it with one that was never killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    stage.begin(whole)
    begun = time.monotonic()
    assert server.run(stage.arguments(whole), whole) == 0, server.said
    takes, expected = time.monotonic() - begun, stage.compared(whole)
    assert expected
    moments, hits = random.Random(seed), 0
    stage.begin(killed)
    for _ in range(_KILLS):
        code = server.run(stage.arguments(killed), killed, killed_after=moments.uniform(0, takes))
        assert code in (0, -signal.SIGKILL), server.said
        if code:
            hits += 1
            if (killed / stage.output).exists():
                stage.check(killed / stage.output, whole / stage.output)
        else:  # what was left took less than the moment
            _assert_same(stage.compared(killed), expected)
            shutil.rmtree(killed)
            stage.begin(killed)
    assert hits >= _KILLS // 4
    assert server.run(stage.arguments(killed), killed) == 0, server.said
    _assert_same(stage.compared(killed), expected)


def _assert_same(found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Name the files that differ: their bytes are no message. Hidden ones are among them."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not any(part.startswith(".") for name in found for part in name.split("/"))


def _empty(place: Path) -> None:
    place.mkdir()


def _force(output: Path) -> tuple[str, ...]:
    return ("--force",) if output.exists() else ()


def _same_bytes(found: Path, expected: Path) -> None:
    assert found.read_bytes() == expected.read_bytes()


def _same_files(found: Path, expected: Path) -> None:
    _assert_same(_files(found), _files(expected))


def _whole_export(found: Path, expected: Path) -> None:
    """Whatever papers it has already."""
    plan = load_plan(found / "plan.json")
    assert plan == load_plan(expected / "plan.json")
    for name in plan.files:
        _same_bytes(found / name, expected / name)


def _files(directory: Path) -> dict[str, object]:
    """Return the bytes of everything below it; of reports what does not depend on the machine's mood."""
    found: dict[str, object] = {
        file.relative_to(directory).as_posix(): None if file.name in _TIMED else file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    for file in directory.rglob("report.json"):
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for runtime in report["runtimes"]:
            for timed in ("load_seconds", "memory", "speed"):
                runtime.pop(timed)
        found[file.relative_to(directory).as_posix()] = report
    return found
