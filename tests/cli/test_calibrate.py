"""``acip-export calibrate``: the runtimes of this machine, timed; what plans then say."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.measure import Measurement

import acip_export
from acip_export.api import plan as planning
from acip_export.api import speed
from acip_export.api.speed import measure_speeds, tensor_shapes
from acip_export.artifacts.speeds import CacheSpeed, LayerSpeed, MatrixSpeed, RuntimeSpeed, SpeedTable, load_speeds
from acip_export.cli.calibrate import speeds_table
from acip_export.devices import speeds_file
from acip_export.errors import SpeedsVersionError
from acip_export.formats.registry import export_format, export_formats
from acip_export.planning.speed_fit import Timed, fit
from acip_export.progress import Progress
from tests.support import Run

ASKED = ("--budget", "3MB", "--types", "q8_0,q4_0", "--context", 64)
BOARD = """[[device]]
name = "board"
title = "Board"
class = "board"
memory = "1GiB"
usable = 0.5
runtimes = { onnx = "onnxruntime" }
types.onnx = ["int4-b64"]
speeds = "board.json"
source = { memory = "m", usable = "u", types = "t" }
"""


@pytest.fixture
def quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models, two types, once each; and a configuration directory of one's own.

    A third type of ONNX is none that graphs for processors can have.
    """
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "config"))
    few, some = replace(speed._FEW, hidden=128, ffn=256, layers=1), replace(speed._FEW, layers=2)
    for name, value in {
        "_SMALL": replace(some, layers=1),
        "_CACHED": some,
        "_LARGE_BYTES": 0,
        "_OFTEN": 2,
        "_LARGE": replace(some, layers=3),
        "_FEW": few,
        "_MANY": replace(few, layers=3),
        "_WIDE": replace(few, vocabulary=2048),
        "_DEEP": replace(few, layers=3),
        "_NARROW": replace(few, layers=4),
        "_LONG_PROMPT": 128,
        "_SECONDS": 0.0,
        "_PASSES": 1,
    }.items():
        monkeypatch.setattr(speed, name, value)
    few_types = {"gguf": ("q8_0", "q4_0"), "onnx": ("int8", "int4-b64", "f16")}
    caches = {"gguf": ("f16", "q8_0", "q4_0"), "onnx": ("f32", "int8", "int4")}
    formats = {
        name: replace(
            export_format(name),
            types=types,
            embedding_types=types,
            narrow_types=(),
            cache_types={cache: export_format(name).cache_types[cache] for cache in caches[name]},
            layouts=export_format(name).layouts[:1],
        )
        for name, types in few_types.items()
    }
    monkeypatch.setattr(speed, "export_format", formats.__getitem__)


@pytest.mark.usefixtures("quickly")
def test_calibrate_then_plan(model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run("plan", *ASKED, "-f", "gguf", "--min-speed", 1)
    assert before.code == 2 and "acip-export calibrate" in before.err
    assert json.loads(run("plan", *ASKED, "-f", "gguf", "--json").out)["speed"] is None
    done = run("calibrate", "-f", "gguf", "--json")
    assert done.code == 0, done.err
    table = load_speeds(speeds_file())
    assert json.loads(done.out) == json.loads(json.dumps(table.to_json()))
    found = table.runtimes["llama.cpp"]
    assert set(table.runtimes) == {"llama.cpp"} and set(found.matrices) == {"q8_0", "q4_0"}
    assert set(found.caches) == {"q8_0", "q4_0"}
    assert "llama.cpp" in found.version
    for speeds in found.matrices.values():
        assert 0 < speeds[0].nbytes < speeds[1].nbytes < speeds[2].nbytes
        assert min(min(speed.read, speed.compute) for speed in speeds) > 0
    planned = run("plan", *ASKED, "-f", "gguf", "--json")
    assert planned.code == 0, planned.err
    predicted = json.loads(planned.out)["speed"]
    assert predicted["answer"] > 0 and predicted["prompt"] > 0
    assert "predicted speed" in run("plan", *ASKED, "-f", "gguf").out
    drawn = run(
        "plan", "--sweep", "-f", "gguf", "--types", "q8_0,q4_0", "--layout", "stock", "--context", 64, "-o", "sweep.svg"
    )
    assert drawn.code == 0 and "tokens/s" in drawn.out + drawn.err
    assert "answer, tokens/s" in (model / "sweep.svg").read_text(encoding="utf-8")
    points = json.loads((model / "sweep.json").read_text())["lines"][0]["points"]
    assert points and all(point["speed"]["answer"] > 0 for point in points)
    assert run("plan", "--sweep", "-f", "gguf", "--min-speed", 1).code == 2
    # Before anything is measured: that changes no speed.
    with monkeypatch.context() as patched:
        patched.setattr(planning, "rounding_errors", None)
        refused = run("plan", *ASKED, "-f", "gguf", "--min-speed", 1e9, "--json")
    assert refused.code == 4 and json.loads(refused.out)["fastest"] > 0
    # The main job takes the flag, too.
    assert run(*ASKED, "-f", "gguf", "--min-speed", 1e9).code == 4
    done = run(*ASKED, "-f", "gguf", "--min-speed", 0.001, "--dry-run", "--json")
    assert done.code == 0 and json.loads(done.out)["speed"] == predicted
    # A second time in its own place, but never over a file of somebody else.
    (model / "mine.json").write_text("{}")
    assert run("calibrate", "-f", "gguf", "-o", "mine.json", "--force").code == 2
    speeds_file().write_text("{}")
    assert run("plan", *ASKED, "-f", "gguf").code == 3


@pytest.mark.usefixtures("quickly")
def test_a_device_with_a_table(model: Path, run: Run) -> None:
    done = run("calibrate", "-f", "onnx", "-o", "board.json")
    assert done.code == 0, done.err
    measured = load_speeds(model / "board.json").runtimes
    rows = [line.split()[:2] for line in done.out.splitlines()]
    told = [[runtime, name] for runtime, each in measured.items() for name in each.matrices]
    assert rows[1 : 1 + len(told)] == told
    for runtime, each in measured.items():
        assert each.prompt_error is not None and each.prompt_error >= 0.15
        assert f"predictions for {runtime}: prompts ± 15%, answers ± 15%" in done.out  # one pass, nothing to compare
    assert set(measured) == {"onnxruntime", "onnxruntime-genai"}
    assert all(set(each.matrices) == {"int8", "int4-b64"} for each in measured.values())
    assert all(set(each.caches) == {"int8", "int4"} for each in measured.values())
    assert not speeds_file().exists()
    (model / "devices.toml").write_text(BOARD)
    asked = ("plan", "--devices", "devices.toml", "--device", "board", "--context", 64)
    planned = run(*asked, "--json")
    assert planned.code == 0, planned.err
    assert json.loads(planned.out)["speed"]["answer"] > 0
    (model / "board.json").unlink()
    missing = run(*asked)
    assert missing.code == 3 and "acip-export calibrate" in missing.err


@pytest.mark.usefixtures("quickly")
def test_one_large_model_is_there_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of each type are written for their runs, in each pass; steps are counted one by one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(speed, "_LARGE", large := replace(speed._LARGE, layers=12))
    monkeypatch.setattr(speed, "_MOST_LAYERS", 12)
    monkeypatch.setattr(speed, "_PASSES", 2)
    least = sum(rows * columns for rows, *rest in tensor_shapes(large).values() for columns in rest) / 2
    there: list[int] = []
    timed = speed.shortest_times

    def look(*args: Any) -> tuple[float, float]:
        there.append(sum(file.stat().st_size > least for file in tmp_path.rglob("*.gguf")))
        return timed(*args)

    monkeypatch.setattr(speed, "shortest_times", look)
    reports: list[Progress] = []
    table = measure_speeds(reports.append, ("gguf",))
    assert all(len(each) == 3 for each in table.runtimes["llama.cpp"].matrices.values())
    assert there.count(1) == 2 * 2 and set(there) == {0, 1}
    for stage in {each.stage for each in reports}:
        steps = [each for each in reports if each.stage == stage]
        assert [each.done for each in steps] == list(range(1, len(steps) + 1)) and steps[-1].total == len(steps)
    assert not list(tmp_path.glob("acip-export-*"))


@pytest.mark.usefixtures("quickly")
@pytest.mark.skipif(sys.platform == "win32", reason="no limit of sizes")
@pytest.mark.parametrize("room", [100_000, 1_200_000], ids=["small", "large"])
def test_no_room_for_the_models(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Neither for those that stay, nor for the large ones that are written when they run."""
    import resource

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(speed, "_LARGE", replace(speed._LARGE, layers=12))
    _, most = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    try:
        full = run("calibrate", "-f", "gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.code == 2 and "no room for the models" in " ".join(full.err.split()) and "TMPDIR" in full.err
    assert not list(tmp_path.glob("acip-export-*"))


def test_the_printed_table_has_a_row_for_each_type_and_fits_80_columns() -> None:
    """Of all runtimes and types that there are."""
    measured = tuple(MatrixSpeed(nbytes, nbytes * 1.23456e3, 1.23456e12) for nbytes in (2 * 10**8, 10**6, 10**7))
    runtimes = {
        session.runtime: RuntimeSpeed("1", dict.fromkeys(known.types, measured), 0, (LayerSpeed(1, 0),), 0, 1, 1, 1)
        for known in export_formats()
        for session in known.sessions
    }
    table = speeds_table(SpeedTable("here", 2, runtimes))
    assert table.row_count == sum(len(known.types) * len(known.sessions) for known in export_formats())
    console = Console(width=1000)
    assert Measurement.get(console, console.options, table).maximum <= 80
    with console.capture() as printed:
        console.print(table)
    row = printed.get().splitlines()[1].split()
    assert row[2:] == ["247", "GB/s", "1,235", "GFLOP/s", "1.23", "GB/s"]


@pytest.fixture
def of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of speeds that another version of this tool has left at the machine's own place."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "config"))
    speeds_file().parent.mkdir(parents=True)
    old = {"artifact": "acip-speeds", "version": 1, "machine": "here", "threads": 2, "runtimes": {"x": {"matrices": 3}}}
    speeds_file().write_text(json.dumps(old))
    return speeds_file()


LEFT_OUT = "predict no speed"


@pytest.mark.usefixtures("of_version_1", "model")
@pytest.mark.parametrize(
    "asked",
    [
        ("plan", *ASKED, "-f", "gguf", "--json"),
        (*ASKED, "--budget", "4MB", "-f", "gguf", "--dry-run", "--json"),
        ("plan", "--sweep", "-f", "gguf", "--types", "q8_0;q4_0", "--layout", "stock", "--context", 64, "--json"),
        ("plan", *ASKED, "-f", "gguf", "--device", "this", "--budget-scope", "memory", "--json"),
    ],
    ids=["plan", "budgets", "sweep", "this machine"],
)
def test_the_own_table_of_another_version_is_left_out(
    run: Run, asked: tuple[str | int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """One line says so, however many plans are made; nobody has to have speeds."""
    planned = run(*asked)
    assert planned.code == 0, planned.err
    (said,) = (message for message in caplog.messages if LEFT_OUT in message)
    assert "\n" not in said and "version 1, this tool reads 2" in said and "acip-export calibrate" in said
    assert '"answer"' not in planned.out


def test_the_own_table_of_another_version_where_a_speed_was_asked_for(
    run: Run, of_version_1: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused, as any table that a device names."""
    for refused in (
        run("plan", *ASKED, "-f", "gguf", "--min-speed", 1),
        run(*ASKED, "-f", "gguf", "--min-speed", 1, "--dry-run"),
    ):
        assert refused.code == 3 and "acip-export calibrate" in refused.err
    assert not caplog.messages
    asked: dict[str, Any] = {"budget": "3MB", "format": "gguf", "types": ("q8_0", "q4_0"), "context": 64}
    assert acip_export.plan(model, **asked).speed is None
    assert [LEFT_OUT in message for message in caplog.messages].count(True) == 1
    with pytest.raises(SpeedsVersionError, match="acip-export calibrate"):
        acip_export.plan(model, **asked, min_speed=1)
    of_version_1.rename(model / "board.json")
    (model / "devices.toml").write_text(BOARD)
    assert run("plan", "--devices", "devices.toml", "--device", "board", "--context", 64).code == 3


@pytest.mark.parametrize(
    "found", ["{", "{}", '{"artifact": "acip-plan", "version": 1}', '{"artifact": "acip-speeds", "version": 2}']
)
@pytest.mark.usefixtures("model")
def test_something_else_where_the_own_table_belongs(run: Run, of_version_1: Path, found: str) -> None:
    """It is refused, whether a speed was asked for or not."""
    of_version_1.write_text(found)
    for more in ((), ("--min-speed", 1)):
        refused = run("plan", *ASKED, "-f", "gguf", *more)
        assert refused.code == 3 and of_version_1.name in "".join(refused.err.split())


def test_the_error_is_what_most_runs_differ_by_from_pass_to_pass() -> None:
    assert speed._error([[1.3, 1.0]] * 9 + [[1.0, 3.0]]) == pytest.approx(0.3 + 0.1 * 1.7)
    assert speed._error([[1.3, 1.0]] * 10) == pytest.approx(0.3)
    assert speed._error([[1.0, 1.01]] * 10) == speed._error([[1.0]]) == 0.15


def test_what_is_measured_together_is_told_apart() -> None:
    """Runs that a table predicts give that table again."""
    matrices = {
        name: (MatrixSpeed(12_810_240, 3 * read, 2 * compute), MatrixSpeed(60_784_640, read, compute))
        for name, read, compute in (("a", 5e9, 4e10), ("b", 8e9, 2e10))
    }
    layers = (LayerSpeed(15_859_712, 3e-5), LayerSpeed(30 * 12 * 360**2 + 512 * 360, 5e-5))
    true = RuntimeSpeed("1", matrices, 2e-4, layers, 2e-10, 2e9, 8e10, head_share=0.5)
    own, slow = true.cache("own"), CacheSpeed(1e9, 3e10)

    def timed(
        name: str,
        layers: int,
        hidden: int,
        vocabulary: int = 512,
        tokens: int = 128,
        kept: CacheSpeed = own,
        share: int = 1,
    ) -> Timed:
        weights, head, cache = layers * 12 * hidden**2, vocabulary * hidden, 4 * hidden * layers / share
        nbytes = weights + head
        fixed = true.token_seconds + layers * true.layer_seconds(nbytes)
        speed = true.matrix(name, nbytes)
        answer = fixed + nbytes / speed.read + cache * tokens / kept.read
        prompt = 2 * (weights + true.head_share * head) / speed.compute + fixed / 128
        prompt += 2 * hidden * tokens * layers / kept.attention + true.width_seconds * hidden * layers
        return Timed(prompt, answer, tokens, 128, nbytes, weights, head, layers, hidden, cache)

    found = fit(
        few_layers=timed("a", 4, 256),
        many_layers=timed("a", 20, 256),
        narrow=timed("a", 30, 360),
        short_prompt=timed("a", 20, 320),
        long_prompt=timed("a", 20, 320, tokens=1024),
        large_vocabulary=timed("a", 4, 256, vocabulary=32768),
        by_type={name: [timed(name, 2, 720, tokens=32), timed(name, 4, 1120)] for name in "ab"},
        caches={"slow": timed("a", 20, 320, tokens=1024, kept=slow, share=4)},
        base="a",
        version="1",
    )
    for name, (small, large) in found.matrices.items():
        for measured in (small, large):
            expected = true.matrix(name, measured.nbytes)
            assert measured.read == pytest.approx(expected.read, rel=0.01)
            assert measured.compute == pytest.approx(expected.compute, rel=0.02)
        assert small.read > 2 * large.read
    assert [each.nbytes for each in found.layers] == [each.nbytes for each in true.layers]
    assert [each.seconds for each in found.layers] == pytest.approx([each.seconds for each in true.layers], rel=0.03)
    for name in ("token_seconds", "cache_read", "attention", "head_share"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.03), name
    assert found.cache("slow").read == pytest.approx(slow.read, rel=0.01)
    assert found.cache("slow").attention == pytest.approx(slow.attention, rel=0.01)


def test_small_models_that_were_disturbed_make_no_type_fast() -> None:
    """What looks like overhead is taken off the large models' time; half of that is their matrices'."""
    weights = 10_000_000

    def run(seconds: float, layers: int, tokens: int = 32) -> Timed:
        return Timed(seconds, seconds, tokens, 32, weights, weights, 1000, layers, 256, 1000.0)

    large = run(0.01, 2)
    found = fit(
        few_layers=run(0.01, 2),
        many_layers=run(0.2, 14),
        narrow=run(0.2, 14),
        short_prompt=run(0.2, 14),
        long_prompt=run(0.2, 14, 512),
        large_vocabulary=replace(run(0.01, 2), head=9000),
        by_type={"a": [large]},
        caches={"c": run(0.1, 14, 512)},
        base="a",
        version="1",
    )
    (measured,) = found.matrices["a"]
    assert measured.read <= 2.01 * weights / large.answer
    assert measured.compute <= 2.01 * 2 * (weights + 1000) / large.prompt
    assert found.cache("c").read <= 2.01 * found.cache_read and found.cache("c").attention <= 2.01 * found.attention
