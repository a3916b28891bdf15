"""The graph added up from names and shapes is as large as the graph that the model builder makes, byte for byte."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from acip_export.artifacts.plan import Serving, TensorDecision
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import causal_lm
from acip_export.weight_types import types_of
from converters.onnx import converter
from converters.onnx.graph import size as outline

FORMATS = [f.name for f in types_of("onnx") if f.item_bytes == 4]
EMBEDDINGS = [name for name in FORMATS if "int2" not in name]


def random_model(seed: int, arch: str) -> tuple[Checkpoint, tuple[TensorDecision, ...], Serving]:
    """A random shape of ``arch`` with a random decision for every tensor."""
    draw = random.Random(seed)
    kv_heads = draw.choice((1, 2, 3))
    heads = kv_heads * draw.choice((1, 2, 11))
    config: dict[str, Any] = {
        "model_type": arch,
        "vocab_size": draw.choice((100, 512, 20_000, 200_000)),
        "hidden_size": heads * draw.choice((8, 25, 64, 100)),
        "intermediate_size": draw.choice((64, 130, 14336)),
        "num_hidden_layers": draw.choice((1, 2, 11)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw.choice((8, 64, 128)),
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": draw.random() < 0.5,
        "sliding_window": None,
    }
    if arch in ("llama", "qwen3"):
        config["attention_bias"] = draw.random() < 0.5
    if arch == "llama":
        config["mlp_bias"] = draw.random() < 0.5
        config["rope_parameters"] = draw.choice(
            (
                {"rope_type": "default", "rope_theta": 10_000.0},
                {
                    "rope_type": "llama3",
                    "rope_theta": 500_000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            )
        )
    with torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in causal_lm(config).named_parameters()}
    decisions = []
    for name, shape in parameters.items():
        if len(shape) == 1:
            decisions.append(TensorDecision(name, shape, "dense", 0, type="f32"))
        elif "embed" in name or "lm_head" in name:
            decisions.append(TensorDecision(name, shape, "dense", 0, type=draw.choice(EMBEDDINGS)))
        elif draw.random() < 0.5:
            decisions.append(TensorDecision(name, shape, "dense", 0, type=draw.choice(FORMATS)))
        else:
            up, down = draw.choice(FORMATS), draw.choice(FORMATS)
            rank = draw.randrange(1, min(shape) + 1)
            decisions.append(TensorDecision(name, shape, "factored", 0, rank=rank, up_type=up, down_type=down))
    return Checkpoint(Path(), config, {}), tuple(decisions), Serving(draw.choice((16, 4096)), "f32", 16)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_sizes_equal_the_builders(arch: str, seed: int) -> None:
    checkpoint, decisions, serving = random_model(seed, arch)
    added_up = outline.outline(checkpoint.config, checkpoint.shape, decisions, serving.context)
    built, _ = converter._graph(checkpoint, decisions, serving, converter.Options(), read_vector=None)
    assert added_up == outline.GraphBytes(len(built.protobuf), built.data_bytes)


def test_what_is_not_described_is_left_to_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, decisions, serving = random_model(0, "llama")
    config, shape = checkpoint.config, checkpoint.shape

    def found(config: dict[str, Any] = config, decisions: tuple[TensorDecision, ...] = decisions) -> bool:
        return outline.outline(config, shape, decisions, serving.context) is not None

    assert found()
    assert not found({**config, "model_type": "gemma3_text"})
    assert not found({**config, "hidden_act": "gelu"})
    assert not found({**config, "partial_rotary_factor": 0.5})
    assert not found({**config, "rope_parameters": {"rope_type": "longrope"}})
    assert not found({**config, "model_type": "mistral", "sliding_window": serving.context - 1})
    assert not found(decisions=decisions[1:])
    assert not found(decisions=(*decisions, TensorDecision("model.extra.weight", (4, 4), "dense", 0, type="f32")))
    embedding = next(d for d in decisions if "embed" in d.name)
    rounded = tuple(replace(d, type="int2") if d is embedding else d for d in decisions)
    assert not found(decisions=rounded)
    monkeypatch.setitem(outline.TESTED, "onnx-ir", "0.0.1")
    assert not found()
