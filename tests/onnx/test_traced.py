"""Architectures that the model builder does not know, traced by torch.onnx, against their bundles in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from acip_export.bundle import load_bundle
from acip_export.checkpoint import Checkpoint
from acip_export.conventions import EMBEDDINGS, HEADS, TIED_BY_DEFAULT
from acip_export.errors import UnsupportedError
from acip_export.modules import load_causal_lm
from acip_export.verify.genai import GenaiSession
from acip_export.verify.measure import compare_logits
from acip_export.verify.onnxruntime import OnnxRuntimeSession
from acip_export.verify.runtime import Windows
from converters.onnx import converter
from tests.onnx.conftest import CONTEXT, EXACT, PROMPT_BATCH
from tests.support import make_bundle, make_plan, make_tokenizer

WINDOWS: Windows = np.random.default_rng(0).integers(0, 512, (2, CONTEXT))
PROMPT = [int(token) for token in WINDOWS[0][: PROMPT_BATCH + 5]]

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
# Learned positions and Conv1D; part of each head rotated, parallel blocks, an untied head; one key head for all queries,
# attention that cannot be exchanged; no positions but slopes of the attention.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"max_position_embeddings": 64},
    "gpt_neox": {"max_position_embeddings": 64, "intermediate_size": 96, "rotary_pct": 0.25},
    "falcon": {"max_position_embeddings": 64, "multi_query": True, "alibi": False},
    "bloom": {},
}
FUSED = ("gpt2", "gpt_neox")


def make_other(directory: Path, kind: str, **overrides: Any) -> Path:
    """A random model with its tokenizer; weights and biases large enough to be missed."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("qwen2")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(kind, **{**SMALL, **CASES[kind], **ids, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim == 1 else 0.5 / min(parameter.shape) ** 0.5
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def float_pairs(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    if not in_layer(name) or "dense_h_to_4h" in name:
        return {"representation": "dense", "format": "f32"}
    return {"representation": "factored", "rank": 32, "up_format": "f32", "down_format": "f32"}


def mixed(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    if name.endswith((*EMBEDDINGS, *HEADS)):
        return {"representation": "dense", "format": "int8"}
    if not in_layer(name):
        return {"representation": "dense", "format": "f32"}
    if "attn" in name or "attention" in name:
        return {"representation": "factored", "rank": 32, "up_format": "int8", "down_format": "int4-b64"}
    return {"representation": "dense", "format": "int4"}


def in_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_runtimes_agree_with_the_bundle(tmp_path: Path, kind: str) -> None:
    model = make_other(tmp_path / "m", kind)
    for rule in (float_pairs, mixed):
        place = tmp_path / rule.__name__
        plan = make_plan(model, "onnx", "factored", rule, CONTEXT, PROMPT_BATCH)
        bundle = make_bundle(model, plan, place / "b")
        (place / "e").mkdir()
        converter.convert(bundle, place / "e", lambda _: None, EXACT)
        reference = load_bundle(bundle.path, converter.round_trip)
        with torch.no_grad():
            expected = list(reference(input_ids=torch.from_numpy(WINDOWS)).logits.numpy())
        # The tolerance below means something only if the logits are of this order.
        assert 0.1 < np.std(expected) < 10
        sessions = [OnnxRuntimeSession(place / "e", plan.runtime, threads=1), GenaiSession(place / "e", plan.runtime)]
        greedy = [session.greedy(PROMPT, 20) for session in sessions]
        for session in sessions:
            agreement = compare_logits(expected, session.logits(WINDOWS), (greedy[0], greedy[1]))
            # Float32 sums in another order, by a graph that fuses nothing.
            assert agreement.max_logit_difference <= 1e-4
            assert agreement.greedy_equal == 20
        written = {
            file.relative_to(place / "e").as_posix(): file.stat().st_size
            for file in (place / "e").rglob("*")
            if file.is_file()
        }
        assert written == converter.predict_files(Checkpoint.open(model), plan.layout, plan.tensors, plan.runtime)
