"""Memory that the system cannot drop: the formulas against processes, and what verification says of a budget of it."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acip_export.api import convert_bundle, export_model, open_scores, plan_export
from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import Plan, Serving, TensorDecision, save_plan
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.shape import ModelShape
from acip_export.planning import PlanRequest
from acip_export.planning.memory import anonymous_bytes
from acip_export.verification.export import verify_export
from acip_export.verification.process import measure_process
from tests.support import dense, make_bundle, make_model, make_plan, make_scores
from tests.verification.conftest import MakeExport

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")

MB = 10**6
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
LARGE = {**SMALL, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 64}


def sizes(
    directory: Path, target: str, layout: str, decide: Callable[..., dict[str, Any]], context: int = 64, **shape: object
) -> dict[str, tuple[int, int]]:
    """Return, by runtime, the anonymous bytes that are planned and those that a process of the export holds."""
    model = make_model(directory / "m", max_position_embeddings=4096, **shape)
    plan = make_plan(model, target, layout, decide, context, 16)
    known = export_format(target)
    convert_bundle(make_bundle(model, plan, directory / "b").path, directory / "e", check=False)
    found = {}
    for session in known.sessions:
        memory = measure_process(session.module, session.name, directory / "e", 120).memory
        assert memory is not None
        found[session.runtime] = (
            anonymous_bytes(known, plan, Checkpoint.open(model), session.runtime),
            memory.allocated_bytes,
        )
    return found


def between(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], runtime: str) -> tuple[int, int]:
    """Return what two processes differ by, as planned and as measured: the libraries' own heap is not in it."""
    planned, measured = (b - a for a, b in zip(before[runtime], after[runtime], strict=True))
    return planned, measured


@pytest.mark.slow
@pytest.mark.parametrize(("form", "tied"), [("f32", False), ("int4", True)])
def test_onnxruntime_copies_what_it_packs(tmp_path: Path, form: str, tied: bool) -> None:
    small, large = (
        sizes(tmp_path / name, "onnx", "factored", dense(type=form), tie_word_embeddings=tied, **shape)
        for name, shape in (("small", SMALL), ("large", LARGE))
    )
    for runtime in small:
        planned, measured = between(small, large, runtime)
        # Allocators move what is held by up to a megabyte from run to run.
        assert measured - MB <= planned <= 1.05 * measured + 2 * MB, runtime


@pytest.mark.slow
def test_llama_cpp_copies_adapters_only(tmp_path: Path) -> None:
    """Mapped weights are free, whatever their type; the pairs of an adapter and the cache are not."""

    def adapted(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        if min(shape) < 512 or "embed" in name:
            return {"representation": "dense", "type": "q4_0"}
        return {"representation": "lora", "type": "q4_0", "rank": 128, "up_type": "f16", "down_type": "f16"}

    runs = {
        name: sizes(tmp_path / name, "gguf", layout, decide, context, **LARGE)
        for name, layout, decide, context in (
            ("q4_0", "stock", dense(type="q4_0"), 64),
            ("f16", "stock", dense(type="f16"), 64),
            ("longer", "stock", dense(type="q4_0"), 4096),
            ("adapter", "lora", adapted, 64),
        )
    }
    (runtime,) = runs["f16"]
    planned, measured = between(runs["q4_0"], runs["f16"], runtime)
    assert planned == 0
    assert abs(measured) < MB  # of 10 MB more in the file
    for name, least in (("longer", 4 * MB), ("adapter", 2 * MB)):
        planned, measured = between(runs["q4_0"], runs[name], runtime)
        assert measured > least
        assert measured - MB <= planned <= 1.05 * measured + MB, name


@pytest.mark.parametrize("room", [0, 30 * MB])
def test_a_budget_of_anonymous_memory_is_checked(exported: MakeExport, tmp_path: Path, room: int) -> None:
    """One that pays for no runtime does not hold; with room for it, it does."""
    made = exported("gguf")
    anonymous = {**dict.fromkeys(made.plan.breakdown, 0), "kv_cache": made.plan.breakdown["kv_cache"]}
    budget = anonymous["kv_cache"] + room
    plan: Plan = dataclasses.replace(made.plan, anonymous=anonymous, budget_scope="anonymous", budget_bytes=budget)
    for name in ("b", "e"):
        shutil.copytree(made.bundle if name == "b" else made.export, tmp_path / name)
        save_plan(plan, tmp_path / name / "plan.json", force=True)
    report = verify_export(tmp_path / "e", Bundle.open(tmp_path / "b"))
    (memory,) = [runtime.memory for runtime in report.runtimes]
    assert memory is not None
    assert memory.within_budget is bool(room)
    assert 0 < memory.allocated_bytes < memory.peak_bytes
    if not room:
        assert "bytes that the system cannot drop" in report.failures[0]
        assert "(anonymous) does not hold" in report.failures[0]


@pytest.mark.parametrize(
    ("head_dim", "form", "batch", "measured"),
    [
        *[(32, "q8_0", 64, 78), (64, "q8_0", 64, 113), (128, "bf16", 64, 179), (256, "q8_0", 64, 310)],
        *[(128, "q8_0", 32, 14), (32, "q4_k", 64, 430), (32, "iq4_xs", 64, 423), (32, "q4_k", 8, 341)],
    ],
)
def test_what_a_thread_of_llama_cpp_takes(head_dim: int, form: str, batch: int, measured: int) -> None:
    """Follows the size of heads and the types, as measured (thousands of bytes); not much more is excused."""
    shape = ModelShape("llama", 2, 256, 512, 8, 2, head_dim, 512, 256, tied_embeddings=True)
    tensors = [TensorDecision("model.layers.0.mlp.up_proj.weight", (512, 256), "dense", nbytes=0, type=form)]
    thread = export_format("gguf").memory.thread(shape, Serving(256, "f16", batch), tensors)
    assert measured * 1000 <= thread <= 1.3 * measured * 1000 + 10_000


# Memory of a process that has filled its context, without what it held before, with a number of threads.
WITH_THREADS = """
import sys
from importlib import import_module
from pathlib import Path
from acip_export.artifacts.plan import load_plan
from acip_export.verification.probe import resident
module, name, export, threads = sys.argv[1:]
serving = load_plan(Path(export) / "plan.json").serving
with getattr(import_module(module), name)(Path(export), serving, int(threads)) as session:
    session.speed(list(range(serving.context - 32)), 32)
    print(resident("RssAnon")[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("target", "form"), [("gguf", "q8_0"), ("gguf", "q4_k"), ("onnx", "int8")])
def test_further_threads_take_no_more_than_is_counted(tmp_path: Path, target: str, form: str) -> None:
    """In every runtime; llama.cpp's threads all work, so that they take not much less either."""
    model = make_model(tmp_path / "m", num_attention_heads=8, max_position_embeddings=512)
    known, checkpoint = export_format(target), Checkpoint.open(model)
    plan = make_plan(model, target, {"gguf": "stock", "onnx": "factored"}[target], dense(type=form), 512, 64)
    export = tmp_path / "e"
    export.mkdir()
    known.imitate(checkpoint, plan.layout, plan.tensors, plan.serving, export)
    save_plan(plan, export / "plan.json")
    thread = known.memory.thread(checkpoint.shape, plan.serving, plan.tensors)
    for session in known.sessions:
        command = [sys.executable, "-c", WITH_THREADS, session.module, session.name, str(export)]
        two, sixteen = (int(subprocess.check_output([*command, count])) for count in ("2", "16"))
        # Resident memory of two processes differs by up to a megabyte from run to run.
        assert sixteen - two <= 14 * thread + MB
        assert target == "onnx" or sixteen - two >= 0.6 * 14 * thread - MB


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_of_llama_cpp_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Two by the plan, further ones where the process is measured."""
    model = Path(shutil.copytree(Path(__file__).parents[2] / "samples" / "llama", tmp_path / "llama"))
    make_scores(model)
    checkpoint = Checkpoint.open(model)
    scores = open_scores(checkpoint, None)
    plan = plan_export(checkpoint, scores, PlanRequest("gguf", 7_500_000, "anonymous", types=("q8_0", "q4_0")))
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    report = export_model(checkpoint, scores, plan, tmp_path / "export")
    assert report is not None
    (memory,) = [runtime.memory for runtime in report.runtimes]
    assert memory is not None and memory.within_budget
    thread = export_format("gguf").memory.thread(checkpoint.shape, plan.serving, plan.tensors)
    assert memory.predicted_anonymous_bytes == plan.anonymous_bytes + thread * max(0, threads - 2)
    assert memory.allocated_bytes <= memory.predicted_anonymous_bytes
    assert memory.peak_bytes <= memory.predicted_bytes
