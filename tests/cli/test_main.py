from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from acip_export.artifacts.plan import save_plan
from acip_export.cli import main as cli
from acip_export.errors import CheckpointError
from acip_export.interrupted import EXIT_INTERRUPTED
from tests.cli.conftest import truncated_scores
from tests.ranking.support import calibration_text, sharp_model
from tests.support import Run, dense, make_plan, make_scores, run_without_importing, unspaced


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_main_job_with_defaults(target: str, model: Path, run: Run) -> None:
    done = run("--budget", "3MB", "--format", target, "--context", 64, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    plan, report = result["plan"], result["report"]
    assert plan["memory_bytes"] <= plan["budget_bytes"] == 3_000_000
    runtime = plan["breakdown"].pop("runtime_library") + plan["breakdown"].pop("runtime_tokenizer")
    assert runtime > 10_000_000  # the library alone is more
    assert sum(plan["breakdown"].values()) == plan["memory_bytes"]
    for name, size in plan["files"].items():
        assert (model / "export" / f"{target}-3MB" / name).stat().st_size == size
    assert report["passed"]
    assert report["written_bytes"] == plan["planned_bytes"]
    assert len(report["runtimes"]) == (2 if target == "onnx" else 1)
    assert json.loads((model / "export" / f"{target}-3MB" / "report.json").read_text()) == report
    # Nothing but the export was left.
    assert [f.name for f in (model / "export").iterdir()] == [f"{target}-3MB"]


def test_dry_run_writes_nothing(model: Path, run: Run) -> None:
    before = sorted(model.rglob("*"))
    done = run("--budget", "3MB", "--format", "gguf", "--dry-run")
    assert done.code == 0, done.err
    assert "3.00 MB" in done.out
    assert "of the budget" in done.out
    as_json = run("--budget", "3MB", "--format", "gguf", "--dry-run", "--json")
    assert json.loads(as_json.out)["budget_bytes"] == 3_000_000
    assert sorted(model.rglob("*")) == before


def test_a_dry_run_names_what_it_keeps(model: Path, run: Run) -> None:
    """What is measured for minutes the export need not measure again."""
    for file in model.glob("*.acip.rounding-*"):
        file.unlink()
    before = sorted(model.rglob("*"))
    asked = ("--budget", "3MB", "--format", "gguf", "--types", "q8_0,f16", "--dry-run")
    first = run(*asked)
    assert first.code == 0, first.err
    kept = set(model.rglob("*")) - set(before)
    assert [file.name for file in kept] == ["tiny.acip.rounding-gguf.json"]
    said = " ".join(first.err.split())
    assert "nothing is exported; what had to be measured is kept for the export in" in said
    assert "tiny.acip.rounding-gguf.json" in said
    assert "kept for" not in run(*asked).err


def test_the_ort_format_is_a_directory_of_its_own(model: Path, run: Run) -> None:
    asked = ("--budget", "3MB", "--format", "onnx", "--context", 64, "--no-verify", "--ort", "--json")
    done = run(*asked)
    assert done.code == 0, done.err
    made = json.loads(done.out)["companions"]["ort"]
    written = {file.name: file.stat().st_size for file in (model / made["out"]).iterdir()}
    assert made["files"] == written
    assert written.keys() >= {"model.ort", "required_operators_and_types.config", "tokenizer.json"}
    assert run(*asked).code == 2  # both outputs are there


def test_stage_by_stage_equals_the_main_job(model: Path, run: Run) -> None:
    asked = ("--budget", "2500kB", "--format", "onnx", "--context", 64)
    assert run("plan", *asked, "-o", "plan.json").code == 0
    assert run("materialize", "plan.json", "-o", "bundle").code == 0
    converted = run("convert", "bundle", "-o", "by-hand")
    assert converted.code == 0
    assert re.search(r"^\d[\d.]+ MB \(\d,\d{3},\d{3} bytes\), as planned", converted.out)
    assert run(*asked, "-o", "at-once", "--no-verify", "--cache", "factors").code == 0
    by_hand, at_once = (
        {f.relative_to(d): f.read_bytes() for f in d.rglob("*") if f.is_file()}
        for d in (model / "by-hand", model / "at-once")
    )
    assert by_hand == at_once
    verified = run("verify", "by-hand", "--bundle", "bundle", "--json")
    assert verified.code == 0, verified.err
    assert json.loads(verified.out)["passed"]


def test_existing_output_is_refused_then_replaced(model: Path, run: Run) -> None:
    asked = ("--budget", "3MB", "--format", "gguf", "--context", 64, "--no-verify", "-o", "out")
    assert run(*asked).code == 0
    first = (model / "out").stat().st_ino
    refused = run(*asked)
    assert refused.code == 2
    assert "--force" in refused.err
    assert (model / "out").stat().st_ino == first
    assert run(*asked, "--force").code == 0
    assert (model / "out").stat().st_ino != first


def _two_score_files(model: Path) -> None:
    shutil.copy(next(model.glob("*.acip")), model / "other.acip")


def _no_score_file(model: Path) -> None:
    next(model.glob("*.acip")).unlink()


def _truncated_weights(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _other_model(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


def _unsupported(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["RwkvForCausalLM"]}))
    _no_score_file(model)
    make_scores(model)


def _export_of_another(model: Path) -> None:
    (model / "export").mkdir()
    plan = replace(make_plan(model, "gguf", "stock", dense(type="q8_0")), model="other", model_fingerprint="0" * 64)
    save_plan(plan, model / "export" / "plan.json")
    (model / "tiny.acip").unlink()  # without scores of this model it was told to rank it


def _nothing(_model: Path) -> None:
    pass


FIT = ("--budget", "3MB", "--format", "gguf", "--context", "64")

BAD: list[tuple[Callable[[Path], None], tuple[str, ...], int, str]] = [
    (_no_score_file, FIT, 3, "acip-export rank"),
    (_two_score_files, FIT, 3, "--scores"),
    (truncated_scores, FIT, 3, "truncated"),
    (_truncated_weights, FIT, 3, "truncated"),
    (_other_model, FIT, 3, "was made for"),
    (_no_config, FIT, 3, "no config.json"),
    (_unsupported, FIT, 5, "RwkvForCausalLM"),
    (_nothing, ("--budget", "3000000", "--format", "gguf"), 2, "no unit"),
    (_nothing, ("--budget", "-3MB", "--format", "gguf"), 2, "more than zero"),
    (_nothing, ("--budget", "100kB", "--format", "gguf"), 4, "smallest feasible budget with a KV cache of f16 is"),
    (_nothing, ("--budget", "100kB", "--format", "gguf"), 4, "--cache-type q4_0"),
    (_nothing, ("--budget", "100kB", "--format", "onnx", "--cache-type", "int4"), 4, "smallest feasible budget is"),
    (_nothing, ("export", "--budget", "3MB"), 2, "leave the word out"),
    (_nothing, ("--budget", "3MB"), 2, "--format"),
    (_nothing, ("--format", "gguf"), 2, "--budget"),
    (_nothing, ("--budget", "3MB", "--format", "tflite"), 5, "unknown format"),
    (_nothing, (*FIT, "--ort"), 2, "--format onnx"),
    (_nothing, (*FIT, "--types", "int4"), 5, "no type of gguf, but of onnx:  --format onnx"),
    (_nothing, (*FIT, "--layout", "x"), 5, "no layout"),
    (_nothing, ("--budget", "3MB", "--format", "gguf", "--context", "9999"), 2, "--context 9999"),
    (_nothing, ("--budget", "3MB", "--format", "gguf", "--context", "0"), 2, "--context 0"),
    (_nothing, (*FIT, "--budget-scope", "disk"), 2, "disk"),
    (_nothing, (*FIT, "--types", "q8_0;q4_k"), 2, "several sets"),
    (_nothing, ("--budget", "3MB", "--format", "gguf", "--context", "8kB"), 2, "8192, 8k or max"),
    (_nothing, (*FIT, "--max-loss", "0.1"), 2, "--context max"),
    (_nothing, (*FIT, "--cache-type", "q1"), 5, "q1"),
    (_nothing, (*FIT, "--cache-type-v", "q1"), 5, "q1"),
    (_nothing, (*FIT, "--cache-type", "f16", "--cache-type-k", "q8_0"), 2, "leave it out"),
    (_nothing, (*FIT, "--prompt-batch", "0"), 2, "--prompt-batch 0"),
    (_nothing, ("--device", "toaster"), 2, "unknown device 'toaster'"),
    (_nothing, ("--device", "raspberry-pi-5-8gb", "--budget", "9GiB"), 2, "more than raspberry-pi-5-8gb has"),
    (_nothing, (*FIT, "--devices", "mine.toml"), 2, "--device NAME"),
    (_nothing, ("--device", "pixel-9-12gb", "--devices", "nowhere.toml"), 3, "nowhere.toml does not exist"),
    (_nothing, (*FIT, "--model", "nowhere"), 3, "nowhere"),
    (_nothing, (*FIT, "--scores", "nowhere.acip"), 3, "does not exist"),
    (_nothing, (*FIT, "--text", "nowhere.txt"), 3, "does not exist"),
    # Before anything is planned, which would not fit.
    (_nothing, (*FIT[2:], "--budget", "100kB", "--text", "nowhere.txt"), 3, "nowhere.txt does not exist; give a file"),
    (_nothing, (*FIT, "--tasks", "nowhere.yaml"), 2, "no task 'nowhere.yaml'"),
    (_nothing, ("--dry-run", *FIT, "--tasks", "nowhere.yaml"), 2, "no task 'nowhere.yaml'"),
    (_nothing, (*FIT, "--colour"), 2, "--colour"),
    (_nothing, ("materialize", "plan.json"), 3, "plan.json does not exist"),
    (_nothing, ("convert", "."), 3, "no bundle"),
    (_nothing, ("verify", "."), 3, "it has no plan.json; name the directory"),
    (_export_of_another, ("verify", "export"), 3, "is not the model of this export, other"),
    (_nothing, ("verify", "config.json"), 3, "config.json is no export: it is a file"),
    (_nothing, ("report", "nowhere/export"), 3, "is no export"),
    (_nothing, ("serve", "nowhere"), 3, "nowhere is no export: it does not exist"),
]


@pytest.mark.parametrize(("harm", "arguments", "code", "says"), BAD)
def test_bad_input(
    harm: Callable[[Path], None], arguments: tuple[str, ...], code: int, says: str, model: Path, run: Run
) -> None:
    harm(model)
    before = sorted(model.rglob("*"))
    outcome = run(*arguments)
    assert outcome.code == code, outcome.err
    assert says in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert sorted(model.rglob("*")) == before, "something was left behind"


def test_rank_then_export_with_defaults(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README shows: rank writes the one score file that the main job then finds."""
    model = sharp_model(tmp_path / "tiny")
    monkeypatch.chdir(model)
    calibration_text(model / "text.txt", repeats=20)
    ranked = run("rank", ".", "--data", "text.txt", "--algorithm", "kfac", "--context", 32)
    assert ranked.code == 0, ranked.err
    assert "100%" in ranked.out
    assert (model / "tiny.acip").is_file()
    for target in ("gguf", "onnx"):
        made = run("--budget", "3MB", "--format", target, "--json")
        assert made.code == 0, made.err
        assert json.loads(made.out)["report"]["passed"]
    refused = run("rank", ".", "--data", "text.txt", "--algorithm", "kfac", "--context", 32)
    assert refused.code == 2
    assert "--force" in refused.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "--data"),
        (("--data", "short.txt"), 3, "at least 2,048 are needed"),
        (("--data", "short.txt", "--algorithm", "kfac", "--basis", "svd"), 2, "--basis is a setting of acip"),
        (("--data", "short.txt", "--stop-ratio", "2"), 2, "between 0 and 1"),
        (("--data", "short.txt", "--set", "adapter_rank=-1"), 2, "cannot be negative"),
        (("--data", "short.txt", "--set", "smallest_sampled=0.9", "--set", "largest_sampled=0.5"), 2, "must rise"),
    ],
)
def test_bad_ranking_input(arguments: tuple[str, ...], code: int, says: str, model: Path, run: Run) -> None:
    _no_score_file(model)
    (model / "short.txt").write_text("too short")
    before = sorted(model.rglob("*"))
    outcome = run("rank", ".", *arguments)
    assert outcome.code == code, outcome.err
    assert says in outcome.err
    assert sorted(model.rglob("*")) == before


@pytest.mark.parametrize(
    ("data", "says"),
    [("nowhere.txt", "nowhere.txt does not exist; give a file"), ("empty", "empty holds no *.txt")],
)
def test_a_text_that_is_missing_is_found_before_anything_is_said(data: str, says: str, model: Path, run: Run) -> None:
    _no_score_file(model)
    (model / "empty").mkdir()
    done = run("rank", ".", "--data", data)
    assert done.code == 3
    assert done.err.startswith(f"error: {says}"), done.err


def _weights(value: float) -> Callable[[Path], None]:
    def fill(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        name = "model.layers.0.mlp.down_proj.weight"
        save_file(
            {**tensors, name: torch.full_like(tensors[name], value)}, model / "model.safetensors", {"format": "pt"}
        )

    return fill


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (_weights(0.0), 3, "model.layers.0.mlp.down_proj.weight is all zeros"),
        (_weights(float("nan")), 3, "model.layers.0.mlp.down_proj.weight holds NaN or infinity"),
        (_weights(float("inf")), 3, "model.layers.0.mlp.down_proj.weight holds NaN or infinity"),
    ],
    ids=["zero-weights", "no-numbers", "infinite-weights"],
)
def test_models_that_cannot_be_ranked(
    damage: Callable[[Path], None], code: int, says: str, model: Path, run: Run
) -> None:
    _no_score_file(model)
    damage(model)
    calibration_text(model / "text.txt")
    before = sorted(model.rglob("*"))
    outcome = run("rank", ".", "--data", "text.txt", "--context", 32)
    assert outcome.code == code, outcome.err
    assert says in outcome.err
    assert sorted(model.rglob("*")) == before


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_partial_export(signal_: signal.Signals, model: Path) -> None:
    """Interrupted once files have begun to appear, at an arbitrary moment before the export is whole."""
    process = subprocess.Popen(
        [sys.executable, "-m", "acip_export", "--budget", "3MB", "--format", "gguf", "--context", "64"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    export = model / "export"
    deadline = time.monotonic() + 120
    while not (export.exists() and any(export.iterdir())):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.005)
    process.send_signal(signal_)
    _, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, err
    assert list(export.iterdir()) == []


@pytest.mark.slow
def test_an_interruption_behind_the_score_file_says_that_it_is_complete(model: Path) -> None:
    _no_score_file(model)
    calibration_text(model / "text.txt")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "acip_export",
            "rank",
            ".",
            "--data",
            "text.txt",
            "--context",
            "32",
            "--algorithm",
            "kfac",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (model / "tiny.acip").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.01)
    time.sleep(0.5)  # behind the tidying up
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, err
    says = "tiny.acip is complete: the ranking is done. What was interrupted is measuring the quantizers"
    assert unspaced(says) in unspaced(err)


@pytest.mark.slow
def test_interrupted_ranking_is_resumed(model: Path, run: Run) -> None:
    _no_score_file(model)
    calibration_text(model / "text.txt")
    ask = ("rank", ".", "--data", "text.txt", "--context", "32")
    process = subprocess.Popen(
        [sys.executable, "-m", "acip_export", *ask, "--learning-rate", "1e-5", "--log-json", "log.jsonl"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 200
    while not ((model / "log.jsonl").exists() and '"masks"' in (model / "log.jsonl").read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, err
    assert b"--resume" in err
    assert not (model / "tiny.acip").exists()
    other = run(*ask, "--resume")  # another learning rate
    assert other.code == 3
    assert "another model, text or settings" in other.err
    assert (model / "tiny.acip.run").exists()


def test_help_needs_no_torch() -> None:
    said = run_without_importing("torch transformers onnx gguf onnxruntime acip_export.report", "--help")
    assert "acip-export --budget 4GB --format gguf" in said


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "no calibration text"),
        (("--data", "missing.txt"), 3, "missing.txt does not exist"),
        (("--data", "x" * 300), 3, f"{'x' * 300} cannot be read: File name too long"),
        (("--data", "config.json", "--memory", "4"), 2, "no unit"),
        (("--data", "config.json", "--set", "x"), 2, "x"),
    ],
)
def test_rank_refuses_without_torch(arguments: tuple[str, ...], code: int, says: str, model: Path) -> None:
    """What is typed wrongly is said at once: torch takes seconds to import."""
    said = run_without_importing("torch transformers", "rank", ".", *arguments, directory=model, code=code)
    assert unspaced(says) in unspaced(said), said


def test_names_of_files_that_are_too_long(model: Path, run: Run) -> None:
    """The message names the one that is: the text, or the score file whose default name is the model's."""
    text = run(*FIT, "--no-verify", "--text", "x" * 300, "-o", "out")
    assert f"{'x' * 300} cannot be read" in text.err and "out cannot be written" not in text.err
    long = "m" * 252
    model.rename(model.with_name(long))
    done = run("rank", f"../{long}", "--data", f"../{long}/config.json")
    assert done.code == 2
    assert f"../{long}/{long}.acip cannot be written: File name too long; choose another place with -o" in done.err


@pytest.mark.parametrize(
    ("target", "heavy"),
    # A kept graph is read by onnx.
    [("gguf", "torch transformers onnx onnx_ir onnxruntime"), ("onnx", "torch transformers onnx_ir onnxruntime")],
)
def test_plan_needs_no_torch(target: str, heavy: str, model: Path, run: Run) -> None:
    asked = ("plan", "--budget", "3MB", "--format", target)
    first = run(*asked)  # which keeps the graph
    assert first.code == 0, first.err
    assert "budget" in run_without_importing(heavy, *asked, directory=model)


def test_sweep(model: Path, run: Run) -> None:
    """Curves fall, start at a budget that is feasible, and presets lie on or above them."""
    asked = ("plan", "--sweep", "--format", "gguf", "--layout", "stock", "--types", "q8_0,q4_k,q2_k;q8_0")
    done = run(*asked, "-o", "curve.svg")
    assert done.code == 0, done.err
    drawing = (model / "curve.svg").read_text(encoding="utf-8")
    assert drawing.lstrip().startswith("<?xml") and "answer, tokens/s" not in drawing
    document = json.loads((model / "curve.json").read_text())
    assert [line["types"] for line in document["lines"]] == [["q8_0", "q4_k", "q2_k"], ["q8_0"]]
    mixed, single = (line["points"] for line in document["lines"])
    for points in (mixed, single):
        assert all(a["used_bytes"] < b["used_bytes"] for a, b in itertools.pairwise(points))
        assert all(a["predicted_loss"] > b["predicted_loss"] for a, b in itertools.pairwise(points))
    smallest = mixed[0]["used_bytes"]
    named = ("plan", "--format", "gguf", "--types", "q8_0,q4_k,q2_k", "--prompt-batch", "32", "--json")
    planned = run(*named, "--budget", f"{smallest}B")
    assert json.loads(planned.out)["certificate"]["bytes_left"] == 0
    assert run(*named, "--budget", f"{smallest - 1}B").code == 4
    presets = document["lines"][0]["presets"]
    assert set(presets) == {"q8_0", "q4_k", "q2_k"}
    for point in presets.values():
        within = [p["predicted_loss"] for p in mixed if p["used_bytes"] <= point["used_bytes"]]
        reached = json.loads(run(*named, "--budget", f"{point['used_bytes']}B").out)["predicted_loss"]
        assert reached <= point["predicted_loss"] + 1e-12
        assert min(within) >= reached - 1e-12
    assert run(*asked, "-o", "curve.svg").code == 2
    printed = run(*asked, "--json")
    assert json.loads(printed.out) == document


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--budget", "3MB"), 2, "leave --budget out"),
        (("-o", "curve.pdf"), 2, ".png or .svg"),
        (("--format", "gguf", "--types", "q4_5"), 5, "no type"),
        (("--format", "gguf", "--context", "0"), 2, "--context 0"),
        (("--format", "gguf", "--context", "16;0"), 2, "--context 0"),
        (("--format", "gguf", "--context", "16;max"), 2, "name it, or several"),
        (("--format", "gguf", "--context", "16;many"), 2, "'many' is no number of tokens"),
    ],
)
def test_bad_sweeps(arguments: tuple[str, ...], code: int, says: str, model: Path, run: Run) -> None:
    before = sorted(model.rglob("*"))
    outcome = run("plan", "--sweep", *arguments)
    assert outcome.code == code, outcome.err
    assert says in outcome.err
    assert sorted(model.rglob("*")) == before


@pytest.mark.usefixtures("model")
def test_several_contexts_are_for_sweeps(run: Run) -> None:
    outcome = run("plan", "--format", "gguf", "--budget", "3MB", "--context", "16;32")
    assert outcome.code == 2
    assert "'16;32' has several; they are the lines of a  --sweep" in " ".join(outcome.err.split(" "))


def test_a_sweep_without_matplotlib_says_what_to_install(
    model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = run("plan", "--sweep", "--format", "gguf")
    assert outcome.code == 7
    assert "pip install 'acip-export[plot]'" in outcome.err
    assert not list(model.glob("sweep.*"))


def test_device_plan(model: Path, run: Run) -> None:
    """A device's budget covers the whole process, and the model's own context bounds the device's."""
    done = run("plan", "--device", "raspberry-pi-5-8gb", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["device"] == "raspberry-pi-5-8gb"
    assert plan["budget_scope"] == "process"
    assert plan["budget_bytes"] == 2**33 * 85 // 100
    assert plan["serving"]["context"] == 256
    assert not {t.get("artifact") for t in plan["tensors"]} & {"iq4_xs", "iq2_xxs"}
    assert (model / "tiny.acip").is_file()


def test_devices(run: Run) -> None:
    listed = {device["name"]: device for device in json.loads(run("devices", "--json").out)}
    assert "browser" in run("devices").out
    shown = run("devices", "iphone-15-pro-8gb")
    assert "rtabmap" in shown.out
    assert json.loads(run("devices", "iphone-15-pro-8gb", "--json").out) == listed["iphone-15-pro-8gb"]
    assert run("devices", "toaster").code == 2


def test_formats(run: Run) -> None:
    assert "q4_k" in run("formats").out
    assert {t["name"] for t in json.loads(run("formats", "--json").out)["onnx"]["types"]} >= {"f32", "int8", "int4"}


def test_every_command_has_help_with_an_example(run: Run) -> None:
    commands = [
        command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
    ]
    for command in commands:
        shown = run(command, "--help")
        assert shown.code == 0
        if command != "formats":
            assert f"acip-export {command} " in shown.out


@pytest.mark.parametrize("command", [str(c.callback and c.callback.__name__) for c in cli.app.registered_commands])
def test_every_command_can_be_debugged_and_quiet(command: str, run: Run) -> None:
    shown = run(command, "--help").out
    assert "--debug" in shown and "--quiet" in shown


def test_quiet_prints_errors_all_the_same(run: Run, tmp_path: Path) -> None:
    inspect = ("inspect", tmp_path / "nothing")
    for words in ((*inspect, "--quiet"), ("-q", *inspect)):  # before the command or after it
        assert run(*words).err.startswith("error: ")


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--budget", "3MB", "--format", "gguf", "--debug"),
        ("--debug", "plan", "--budget", "3MB", "--format", "gguf"),
        ("--budget", "3MB", "--format", "gguf", "--debug"),
    ],
)
def test_debug_shows_the_traceback(words: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    """It may stand before the command or after it."""
    model = ("--model", tmp_path / "nothing")
    where = words.index("--budget")
    with pytest.raises(CheckpointError):
        run(*words[:where], *model, *words[where:])
    plain = run(*(word for word in (*words[:where], *model, *words[where:]) if word != "--debug"))
    assert plain.code == 3 and "Traceback" not in plain.err


def test_a_value_that_reads_debug_is_no_flag(run: Run) -> None:
    assert run("inspect", "--", "--debug").code == 3


@pytest.mark.usefixtures("model")
def test_a_budget_of_what_cannot_be_dropped(run: Run) -> None:
    """llama.cpp maps its weights, so that the best types fit whatever pays for runtime and cache."""
    ask = ("plan", "--budget-scope", "anonymous", "--format", "gguf", "--context", 64, "--json")
    done = run(*ask, "--budget", "8MB")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["anonymous"]["weights"] == 0 < plan["breakdown"]["weights"]
    assert plan["budget_bytes"] - plan["certificate"]["bytes_left"] == sum(plan["anonymous"].values())
    assert any("stay mapped and are not in the budget" in note for note in plan["notes"])
    refused = run(*ask, "--budget", "4MB")
    assert refused.code == 4
    assert "most of it runtime library" in refused.err + refused.out
