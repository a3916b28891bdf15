"""Graphs for neural processors, computed on the processor: static shapes, standard operators, the bundle's numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from acip_export.api import export_model, plan_export
from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from converters.onnx.backends import STATIC_CACHE
from converters.onnx.companion_files import MODEL_FILE
from converters.onnx.runtimes.genai import GenaiSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.onnx.conftest import CONTEXT, SIZES, Export, half_export
from tests.onnx.test_converter import dequantized
from tests.onnx.test_families import CASES, PROMPT, WINDOWS
from tests.support import dense, everywhere, make_model, make_scores

RULES = {
    "f16": dense(type="f16"),
    "pairs": everywhere(
        representation="factored", rank=32, up_type="int8-f16", down_type="int4-f16", embedding_type="f16"
    ),
}
# What the provider's tables of operators have, and Constant and Shape, which are folded before it is asked.
TAKEN = {
    "Add", "And", "Cast", "Concat", "Constant", "Equal", "Gather", "Greater", "Less", "LessOrEqual", "MatMul",
    "MatMulNBits", "Mul", "Reshape", "Sigmoid", "SimplifiedLayerNormalization", "Slice", "Softmax", "Sub",
    "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def export(directory: Path, arch: str, settings: dict[str, Any], rule: str) -> Export:
    return half_export(directory, arch, settings, RULES[rule], STATIC_CACHE)


@pytest.mark.parametrize(
    ("case", "rule", "tied"), [("llama", "pairs", True), ("qwen3", "f16", False), ("mistral", "pairs", False)]
)
def test_the_same_numbers_in_standard_operators(tmp_path: Path, case: str, rule: str, tied: bool) -> None:
    arch, settings = CASES.get(case, (case, {}))
    made = export(tmp_path, arch, {**settings, "tie_word_embeddings": tied}, rule)
    runtime = made.bundle.plan.serving
    with torch.no_grad():
        expected = dequantized(made.bundle)(input_ids=torch.from_numpy(WINDOWS)).logits.numpy()
    with OnnxRuntimeSession(made.path, runtime, threads=1) as plain, GenaiSession(made.path, runtime) as genai:
        for session in (plain, genai):
            # float16 has eleven bits: two layers of it move logits of this size by about 1e-3.
            assert max(np.abs(a - b).max() for a, b in zip(expected, session.logits(WINDOWS), strict=True)) <= 5e-3
        assert plain.greedy(PROMPT, 20) == genai.greedy(PROMPT, 20)
    assert made.written == made.predicted()
    graph = onnx.load(made.path / MODEL_FILE, load_external_data=False).graph
    assert {node.op_type for node in graph.node} <= TAKEN
    free = {d.dim_param for value in graph.input for d in value.type.tensor_type.shape.dim if d.dim_param}
    assert free <= {"sequence_length", "total_sequence_length"}


def test_a_cache_that_was_never_cleared_does_no_harm(tmp_path: Path) -> None:
    made = export(tmp_path, "llama", {}, "f16")
    session = onnxruntime.InferenceSession(str(made.path / MODEL_FILE), providers=["CPUExecutionProvider"])
    tokens = np.arange(9, dtype=np.int64)[None]

    def logits(fill: float) -> Any:
        feeds: dict[str, Any] = {
            value.name: np.full(value.shape, fill, np.float16)
            for value in session.get_inputs()
            if value.name.startswith("past")
        }
        known = {"input_ids": tokens, "position_ids": tokens, "attention_mask": np.ones_like(tokens)}
        feeds |= {value.name: known[value.name] for value in session.get_inputs() if value.name in known}
        return session.run(["logits"], feeds)[0]

    np.testing.assert_array_equal(logits(0.0), logits(float("nan")))


@pytest.mark.slow
def test_planned_and_verified(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", **SIZES)
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    for backend, budget in ((STATIC_CACHE, 800_000), ("mobile", 700_000)):
        request = PlanRequest("onnx", budget, backend=backend, context=CONTEXT, prompt_batch=8)
        plan = plan_export(checkpoint, scores, request)
        report = export_model(checkpoint, scores, plan, tmp_path / backend, verify=True)
        assert report is not None and report.passed
        assert report.written_bytes == plan.planned_bytes <= plan.memory_bytes <= plan.budget_bytes


def test_what_the_target_cannot_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", **SIZES)
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    for message, backend, kind in (
        ("blocks of 32 and 64", STATIC_CACHE, "int4-b128-f16"),
        ("zero points", STATIC_CACHE, "uint4-f16"),
        ("2 bits on ARM", "mobile", "int2-b64"),
        ("multiples of 32", "mobile", "int4-b16"),
    ):
        with pytest.raises(UnsupportedError, match=re.escape(message)):
            plan_export(checkpoint, scores, PlanRequest("onnx", 10**6, backend=backend, types=(kind,)))
    with pytest.raises(UnsupportedError, match="soft cap"):
        export(tmp_path / "x", "gemma2", {}, "f16")
    assert not (tmp_path / "x" / "e" / "onnx").exists()
