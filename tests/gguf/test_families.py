"""Every family of models against its bundle in PyTorch: names, norms, caps, windows, multipliers, positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from acip_export.artifacts.bundle import load_bundle
from acip_export.model.checkpoint import Checkpoint
from converters.gguf import converter
from converters.gguf.architectures import FAMILIES
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from tests.gguf.conftest import export
from tests.gguf.test_converter import FLOAT_TOLERANCE, SERVED_TOLERANCE, agreement, assert_float_agreement
from tests.gguf.tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from tests.support import CORPUS, dense, everywhere, make_model, rope

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 928,
}
# Shorter than the windows of tokens that are compared (48), longer than a prompt batch (16).
WINDOW = 20
# ggml takes GELU from a table of float16 values.
GELU_TOLERANCE = 3e-3
HALF = SIZES["head_dim"] // 2


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "original_max_position_embeddings": 64,
    "short_factor": [1 + index / 10 for index in range(HALF)],
    "long_factor": [2 + index / 3 for index in range(HALF)],
}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
# Not the head's size, so that the scale has to be written into the weights.
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": WINDOW}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, linear positions": ("llama", rope("linear", factor=4.0)),
    "llama, llama3 positions": ("llama", rope("llama3", **LLAMA3)),
    "llama, yarn": ("llama", rope("yarn", factor=16.0, original_max_position_embeddings=16)),
    "llama, yarn with its own attention factor": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.3),
    ),
    "llama, biases and an untied head": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, SentencePiece": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2, caps that bite": ("gemma2", {**GEMMA, "attn_logit_softcapping": 0.1, "final_logit_softcapping": 0.5}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    # transformers caps the logits of a Gemma 3, and not its attention; so does llama.cpp.
    "gemma3, caps that bite": (
        "gemma3_text",
        {**GEMMA, "attn_logit_softcapping": 0.1, "final_logit_softcapping": 0.5, "num_hidden_layers": 7},
    ),
    "gemma3, other windowed layers, linear positions": (
        "gemma3_text",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "phi3, part of the head rotated": ("phi3", rope("default", partial_rotary_factor=0.5)),
    "phi3, longrope": ("phi3", rope("longrope", **LONG)),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "granite": ("granite", GRANITE),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5, linear positions and an untied head": (
        "ernie4_5",
        {**rope("linear", factor=8.0), "tie_word_embeddings": False},
    ),
}


# The kind of tokenizer that a family's models have; the others have Llama 3's byte-level BPE or Qwen 2's.
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama, linear positions": partial(sentencepiece_tokenizer, "llama2"),
    "mistral": partial(byte_level_tokenizer, "tekken"),
    "mistral, SentencePiece": partial(sentencepiece_tokenizer, "mistral"),
    **{case: partial(sentencepiece_tokenizer, "gemma") for case in CASES if case.startswith("gemma")},
    "phi3": partial(sentencepiece_tokenizer, "phi3"),
    "phi3, part of the head rotated": partial(byte_level_tokenizer, "gpt-4o"),
    "llama, biases and an untied head": partial(byte_level_tokenizer, "smollm"),  # SmolLM 2
    "smollm3": partial(byte_level_tokenizer, "llama-bpe"),
    "olmo2": partial(byte_level_tokenizer, "dbrx"),
    "granite": partial(byte_level_tokenizer, "smollm"),
    "ernie4_5": partial(sentencepiece_tokenizer, "llama2"),
}


def family_model(case: str, directory: Path, **changes: Any) -> Path:
    kind, settings = CASES[case]
    tokenizer = TOKENIZERS[case]() if case in TOKENIZERS else None
    # The seed is one whose greedy tokens are no near ties.
    return make_model(directory / "model", kind, seed=1, tokenizer=tokenizer, **{**SIZES, **settings, **changes})


def test_every_decoder_has_a_case() -> None:
    kinds = {kind for family in FAMILIES for kind in family.model_types} - {"bert"}
    assert {kind for kind, _ in CASES.values()} == kinds


@pytest.mark.parametrize("case", CASES)
# transformers comments on the position encodings of the test, and on our tiny lengths.
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_llama_cpp_agrees_with_the_bundle(case: str, tmp_path: Path) -> None:
    kind, model = CASES[case][0], family_model(case, tmp_path)
    bundle, out = export(model, "stock", dense(type="f32"), tmp_path)
    reference = load_bundle(bundle.path)
    assert_float_agreement(agreement(reference, out), GELU_TOLERANCE if "gemma" in kind else FLOAT_TOLERANCE)
    assert_float_agreement(agreement(reference, out, cache_type="f16"), SERVED_TOLERANCE)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with LlamaCppSession(out, bundle.plan.serving, threads=1) as session:
        for text in CORPUS[:2]:  # the kinds of tokenizers have tests of their own; here: it is the right one
            assert session.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    checkpoint = Checkpoint.open(model)
    predicted = converter.predict_files(checkpoint, "stock", bundle.plan.tensors, bundle.plan.serving)
    assert {file.name: file.stat().st_size for file in out.iterdir()} == predicted


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "phi3", "granite"])
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_factor_pairs_of_odd_projections(case: str, tmp_path: Path) -> None:
    """Fused projections and scaled queries as base and adapter; odd widths keep the base at q8_0."""
    kind, model = CASES[case][0], family_model(case, tmp_path)
    rule = everywhere(representation="lora", type="q8_0", rank=32, up_type="f32", down_type="f32", embedding_type="f32")
    bundle, out = export(model, "lora", rule, tmp_path)
    found = agreement(load_bundle(bundle.path), out)
    assert_float_agreement(found, GELU_TOLERANCE if "gemma" in kind else FLOAT_TOLERANCE)


# What a setting of a case would be if the converter forgot it.
FORGOTTEN: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": 4096,
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    **dict.fromkeys(GRANITE, 1.0),
}


def settings_that_matter(case: str) -> list[str]:
    kind, settings = CASES[case]
    ignored = {"attn_logit_softcapping"} if kind == "gemma3_text" else ()
    return [name for name, value in settings.items() if name in FORGOTTEN.keys() - ignored and value is not None]


@pytest.mark.parametrize("case", [case for case in CASES if settings_that_matter(case)])
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_the_settings_of_these_cases_matter(case: str, tmp_path: Path) -> None:
    """Else the test above could not tell whether they are obeyed."""
    (kind, settings), model = CASES[case], family_model(case, tmp_path)
    windows = torch.from_numpy(np.random.default_rng(1).integers(3, 512, (1, 48)))

    def logits(**changes: Any) -> torch.Tensor:
        loaded = AutoModelForCausalLM.from_pretrained(model, **changes)
        with torch.no_grad():
            return loaded(windows).logits

    as_it_is = logits()
    for name in settings_that_matter(case):
        forgotten = FORGOTTEN[name]
        if name == "rope_parameters" and "full_attention" in settings[name]:
            forgotten = dict.fromkeys(settings[name], forgotten)
        difference = float((logits(**{name: forgotten}) - as_it_is).abs().max())
        assert difference > 3 * (GELU_TOLERANCE if "gemma" in kind else FLOAT_TOLERANCE), name
