"""Graphs in float16, for graphics cards, computed on the processor: the same operators, checked against the bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from acip_export.api import export_model, plan_export
from acip_export.artifacts.plan import Serving
from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from acip_export.verification.metrics import compare_logits
from converters.onnx import converter
from converters.onnx.backends import OTHERS, PROVIDERS
from converters.onnx.runtimes.genai import GenaiSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.onnx.conftest import CONTEXT, PROMPT_BATCH, SIZES, Export, half_export
from tests.onnx.consumers import transformers_js
from tests.onnx.test_converter import dequantized
from tests.onnx.test_families import CASES, PROMPT, WINDOWS
from tests.support import dense, everywhere, make_model, make_scores

RULES: dict[str, Callable[[str, tuple[int, ...]], dict[str, Any]]] = {
    "f16": dense(type="f16"),
    "int4, float embedding": dense(type="int4-b64-f16", embedding_type="f16"),
    "pairs": everywhere(
        representation="factored", rank=32, up_type="int8-f16", down_type="int4-f16", embedding_type="int8-f16"
    ),
}


def export(directory: Path, arch: str, settings: dict[str, Any], rule: str) -> Export:
    return half_export(directory, arch, settings, RULES[rule], "webgpu")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["gemma2", "olmo2", "phi3", "qwen3, linear positions"])
def test_runtimes_agree_with_the_bundle(tmp_path: Path, case: str, rule: str) -> None:
    arch, settings = CASES[case]
    made = export(tmp_path, arch, {**settings, "tie_word_embeddings": rule != "f16"}, rule)
    runtime = made.bundle.plan.serving
    with torch.no_grad():
        expected = list(dequantized(made.bundle)(input_ids=torch.from_numpy(WINDOWS)).logits.numpy())
    with OnnxRuntimeSession(made.path, runtime, threads=1) as plain, GenaiSession(made.path, runtime) as genai:
        greedy = plain.greedy(PROMPT, 20), genai.greedy(PROMPT, 20)
        for session in (plain, genai):
            agreement = compare_logits(expected, session.logits(WINDOWS), greedy)
            # float16 has eleven bits: two layers of it move logits of this size by about 1e-3.
            assert agreement.max_logit_difference <= 5e-3
    assert greedy[0] == greedy[1]
    assert made.written == made.predicted()
    config = json.loads((made.path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"WebGPU": {}}]


def test_transformers_js_keeps_the_cache_in_the_graphs_precision(tmp_path: Path) -> None:
    made = export(tmp_path, "llama", {}, "pairs")
    with GenaiSession(made.path, made.bundle.plan.serving) as genai:
        expected = genai.greedy(PROMPT, 12)
    (answer,) = transformers_js("transformers.mjs", [made.path], {"texts": [], "prompt": PROMPT, "count": 12})
    assert answer["tokens"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("backend", [known.name for known in OTHERS if known.name in PROVIDERS])
def test_planned_for_a_graphics_card(tmp_path: Path, backend: str) -> None:
    model = make_model(tmp_path / "m", **SIZES)
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    request = PlanRequest("onnx", 700_000, backend=backend, context=CONTEXT, prompt_batch=8)
    plan = plan_export(checkpoint, scores, request)
    assert plan.serving.cache_types == "f16"
    names = {name for d in plan.tensors for name in (d.type, d.up_type, d.down_type) if name}
    assert all(name.endswith("f16") for name in names)
    assert backend != "dml" or not any("int8" in name for name in names)
    report = export_model(checkpoint, scores, plan, tmp_path / "e", verify=True)
    assert report is not None and report.passed
    assert report.written_bytes == plan.planned_bytes <= plan.memory_bytes <= plan.budget_bytes
    # Half the cache of the processor's graph.
    processor = plan_export(checkpoint, scores, replace(request, backend="cpu"))
    assert 2 * plan.breakdown["kv_cache"] == processor.breakdown["kv_cache"]


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", **SIZES)
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    for message, request in {
        "has no backend 'tpu'; it has: cpu, webgpu": PlanRequest("onnx", 10**6, backend="tpu"),
        "gguf has no backend 'webgpu'": PlanRequest("gguf", 10**6, backend="webgpu"),
        "no type 'int4' here; it has: f16": PlanRequest("onnx", 10**6, backend="webgpu", types=("int4",)),
        "int8-f16 is not exported: DirectML": PlanRequest("onnx", 10**6, backend="dml", types=("int8-f16",)),
        "CUDA multiply 4 and 8 bits": PlanRequest("onnx", 10**6, backend="cuda", types=("uint2-b64-f16",)),
        "int2-b256 is not exported: onnxruntime has no kernel": PlanRequest("onnx", 10**6, types=("int2-b256",)),
        "no type 'int4-f16' here; it has: f32": PlanRequest("onnx", 10**6, types=("int4-f16",)),
    }.items():
        with pytest.raises(UnsupportedError, match=re.escape(message)):
            plan_export(checkpoint, scores, request)
    made = export(tmp_path / "x", "llama", {}, "f16").bundle.plan
    plain = Serving(CONTEXT, "f32", PROMPT_BATCH)
    with pytest.raises(UnsupportedError, match="plan again with  --backend cpu"):
        converter.predict_files(checkpoint, "factored", made.tensors, plain)
    with pytest.raises(UnsupportedError, match="use --cache-type f16"):
        converter.predict_files(
            checkpoint, "factored", made.tensors, Serving(CONTEXT, "f32", PROMPT_BATCH, made.serving.backend)
        )
