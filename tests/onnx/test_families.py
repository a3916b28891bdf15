"""Every family against its bundle in PyTorch, in onnxruntime and in genai: position encodings, windows, odd layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from acip_export.artifacts.bundle import load_bundle
from acip_export.formats.session import Windows
from acip_export.verification.metrics import compare_logits
from converters.onnx import converter
from converters.onnx.genai_builder.families import FAMILIES
from converters.onnx.runtimes.genai import GenaiSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.onnx.conftest import CONTEXT, EXACT, PROMPT_BATCH, RULES, SIZES, Export
from tests.onnx.test_converter import dequantized
from tests.support import greedy_tokens, make_bundle, make_model, make_plan, rope

WINDOWS: Windows = np.random.default_rng(0).integers(0, 512, (2, CONTEXT))
PROMPT = [int(token) for token in WINDOWS[0][: PROMPT_BATCH + 5]]
# Shorter than a window of tokens, longer than a prompt batch.
WINDOW = 20

GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": WINDOW}
HALF = SIZES["head_dim"] // 2


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
# Ends below the context, so that the factors for long texts are the ones in use.
LONG = {
    "original_max_position_embeddings": 32,
    "short_factor": [1 + index / 10 for index in range(HALF)],
    "long_factor": [2 + index / 3 for index in range(HALF)],
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5, llama3 positions and biases": ("ernie4_5", {**rope("llama3", **LLAMA3), "use_bias": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2, caps that bite": ("gemma2", {**GEMMA, "attn_logit_softcapping": 0.1, "final_logit_softcapping": 0.5}),
    # transformers caps the logits of a Gemma 3, and not its attention.
    "gemma3, caps that bite": ("gemma3_text", {**GEMMA, "attn_logit_softcapping": 0.1, "final_logit_softcapping": 0.5}),
    "gemma3, its own positions by kind of layer": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
    "llama, llama3 positions": ("llama", rope("llama3", **LLAMA3)),
    "llama, yarn": ("llama", rope("yarn", factor=16.0, original_max_position_embeddings=16)),
    "mistral, window": ("mistral", {"sliding_window": WINDOW}),
    "olmo2": ("olmo2", {}),
    # A head size that its configuration derives itself.
    "phi3": ("phi3", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "phi3, part of the head rotated": ("phi3", rope("default", partial_rotary_factor=0.5)),
    "phi3, longrope": ("phi3", {**rope("longrope", **LONG), "num_attention_heads": 3, "num_key_value_heads": 1}),
    "qwen2, windows above the first layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3, linear positions": ("qwen3", rope("linear", factor=2.0)),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
}


def test_every_family_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)


def export(tmp_path: Path, case: str, rule: str) -> Export:
    kind, settings = CASES[case]
    model = make_model(tmp_path / "m", kind, **{**SIZES, **settings})
    bundle = make_bundle(
        model, make_plan(model, "onnx", "factored", RULES[rule], CONTEXT, PROMPT_BATCH), tmp_path / "b"
    )
    (tmp_path / "e").mkdir()
    converter.convert(bundle, tmp_path / "e", lambda _: None, EXACT)
    return Export(tmp_path / "e", model, bundle)


@pytest.mark.parametrize("rule", ["factored f32", "mixed"])
@pytest.mark.parametrize("case", CASES)
# transformers comments on the position encodings of the test, and on our tiny lengths.
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_runtimes_agree_with_the_bundle(tmp_path: Path, case: str, rule: str) -> None:
    made = export(tmp_path, case, rule)
    runtime = made.bundle.plan.serving
    reference = dequantized(made.bundle) if rule == "mixed" else load_bundle(made.bundle.path)
    with torch.no_grad():
        expected = list(reference(input_ids=torch.from_numpy(WINDOWS)).logits.numpy())
    # The tolerance below means something only if the logits are of this order.
    assert 0.1 < np.std(expected) < 10
    if rule != "mixed":
        # A text shorter than longrope's original context, in a longer one.
        expected_greedy = greedy_tokens(reference, PROMPT, 20)
    with OnnxRuntimeSession(made.path, runtime, threads=1) as plain, GenaiSession(made.path, runtime) as genai:
        greedy = plain.greedy(PROMPT, 20), genai.greedy(PROMPT, 20)
        for session in (plain, genai):
            agreement = compare_logits(expected, session.logits(WINDOWS), greedy)
            # Ten times what float32 sums in another order give.
            assert agreement.max_logit_difference <= 1e-5
            assert agreement.greedy_equal == 20
    if rule != "mixed":
        assert greedy[0] == expected_greedy
    assert made.written == made.predicted()


@pytest.mark.parametrize("case", [case for case, (_, settings) in CASES.items() if "sliding_window" in settings])
def test_the_windows_of_these_cases_matter(tmp_path: Path, case: str) -> None:
    """Else the test above could not tell a window from none."""
    kind, settings = CASES[case]
    model = make_model(tmp_path / "m", kind, **{**SIZES, **settings})

    def logits(window: int) -> torch.Tensor:
        dense = AutoModelForCausalLM.from_pretrained(model, sliding_window=window)
        with torch.no_grad():
            return dense(input_ids=torch.from_numpy(WINDOWS)).logits

    assert float((logits(WINDOW) - logits(CONTEXT)).abs().max()) > 1e-3
