"""Types of the KV cache, from the plan to every runtime that opens the export, and what says so to the user."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from acip_export.api import export_model, plan_export
from acip_export.artifacts.plan import load_plan
from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from converters.gguf.run_commands import server
from converters.gguf.runtimes.llama_chat import LlamaChatSession
from tests.support import make_model, make_scores

SIZES = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_an_export_is_run_with_the_types_of_its_plan(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", **SIZES)
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    request = PlanRequest("gguf", 10**6, context=256, prompt_batch=32, cache_type_k="q8_0", cache_type_v="q4_0")
    plan = plan_export(checkpoint, scores, request)
    layers, width = checkpoint.shape.layers, checkpoint.shape.kv_heads * checkpoint.shape.head_dim
    assert plan.breakdown["kv_cache"] == 256 * layers * width * (34 + 18) // 32
    report = export_model(checkpoint, scores, plan, tmp_path / "e", verify=True)
    assert report is not None and report.passed
    assert plan.used_bytes <= plan.budget_bytes
    assert load_plan(tmp_path / "e" / "plan.json").serving == plan.serving
    for file in ("README.md", "report.html"):
        assert "q8_0 (K), q4_0 (V)" in (tmp_path / "e" / file).read_text(encoding="utf-8")
    options = dict(pairwise(server(plan, tmp_path / "e")))
    assert (options["--cache-type-k"], options["--cache-type-v"]) == ("q8_0", "q4_0")
    with LlamaChatSession(tmp_path / "e", plan.serving, threads=1) as session:
        assert session.buffers is not None
        assert session.buffers.kv_cache == pytest.approx(plan.breakdown["kv_cache"], abs=2 * 0.01 * 2**20)


def test_a_float_export_may_have_a_rounded_cache(tmp_path: Path) -> None:
    """It is not held to the tolerance of one that rounds nothing."""
    model = make_model(tmp_path / "m", **SIZES)
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    request = PlanRequest("gguf", 10**8, types=("f16",), context=256, prompt_batch=32, cache_type="q4_0")
    report = export_model(checkpoint, scores, plan_export(checkpoint, scores, request), tmp_path / "e", verify=True)
    assert report is not None and report.passed


def test_heads_that_are_no_whole_blocks_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", **{**SIZES, "head_dim": 16})
    request = PlanRequest("gguf", 10**6, context=256, cache_type_v="q4_0")
    with pytest.raises(
        UnsupportedError,
        match=r"no KV cache of f16 \(K\), q4_0 \(V\): its heads have 16 .* possible are f16, bf16, f32",
    ):
        plan_export(Checkpoint.open(model), make_scores(model), request)
