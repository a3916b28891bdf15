"""A plan measures the graph that is written: made of shapes alone, from a graph that is kept, without torch."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from acip_export.artifacts.plan import Serving, TensorDecision
from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import causal_lm
from converters.onnx import converter
from converters.onnx.backends import STATIC_CACHE
from converters.onnx.format import ONNX
from converters.onnx.genai_builder.decoder import marked_decoder
from tests.onnx.conftest import MakeExport

TYPES = [form.name for form in ONNX.weight_types if form.item_bytes == 4]
EMBEDDINGS = [name for name in TYPES if "int2" not in name]


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
        # Of 16 and 4096 tokens, the longer context has windows.
        "sliding_window": draw.choice((None, 100)),
        "use_sliding_window": True,
        "max_window_layers": 1,
        "pad_token_id": 0,
    }
    if arch in ("llama", "qwen3"):
        config["attention_bias"] = draw.random() < 0.5
    if arch == "llama":
        config["mlp_bias"] = draw.random() < 0.5
    with torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in causal_lm(config).named_parameters()}
    decisions = []
    for name, shape in parameters.items():
        if len(shape) == 1:
            decisions.append(TensorDecision(name, shape, "dense", 0, type="f32"))
        elif "embed" in name or "lm_head" in name:
            decisions.append(TensorDecision(name, shape, "dense", 0, type=draw.choice(EMBEDDINGS)))
        elif draw.random() < 0.5:
            decisions.append(TensorDecision(name, shape, "dense", 0, type=draw.choice(TYPES)))
        else:
            up, down = draw.choice(TYPES), draw.choice(TYPES)
            rank = draw.randrange(1, min(shape) + 1)
            decisions.append(TensorDecision(name, shape, "factored", 0, rank=rank, up_type=up, down_type=down))
    return Checkpoint(Path(), config, {}), tuple(decisions), Serving(draw.choice((16, 4096)), "f32", 16)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2"])
def test_the_graph_of_shapes_is_the_graph_with_numbers(arch: str, seed: int) -> None:
    checkpoint, decisions, serving = random_model(seed, arch)
    shapes = {decision.name: decision.shape for decision in decisions}
    options = converter.Options()
    measured, _ = converter._graph(checkpoint, decisions, serving, options, read_vector=None)
    written, contents = converter._graph(
        checkpoint, decisions, serving, options, read_vector=lambda name: torch.zeros(shapes[name])
    )
    assert measured == written
    assert sum(int(content.dtype.itemsize * torch.Size(content.shape).numel()) for content in contents.values()) == (
        written.data_bytes
    )


def test_every_context_with_the_same_windows_has_one_marked_graph() -> None:
    checkpoint, _, _ = random_model(0, "mistral")

    def settings(backend: str, context: int, **changes: Any) -> str:
        changed = Checkpoint(Path(), {**checkpoint.config, "sliding_window": 100, **changes}, {})
        half = "f16" in ONNX.on(backend).cache_types
        return marked_decoder(changed.config, changed.shape, backend, half, context).settings

    assert settings("cpu", 16) == settings("cpu", 100) == settings("mobile", 100) != settings("cpu", 101)
    assert settings("cpu", 101) == settings("cpu", 4096)
    assert settings("cpu", 16) != settings("cpu", 16, rms_norm_eps=1e-3)
    assert settings("webgpu", 16) == settings("webgpu", 100)
    assert settings(STATIC_CACHE, 16) != settings(STATIC_CACHE, 100) != settings("webgpu", 100)


def test_a_kept_graph_is_measured_without_torch(make_export: MakeExport) -> None:
    export = make_export("llama", True, "mixed")
    predicted = export.predicted()
    script = (
        "import json, sys; from pathlib import Path\n"
        "from acip_export.artifacts.plan import load_plan\n"
        "from acip_export.model.checkpoint import Checkpoint\n"
        "from converters.onnx import converter\n"
        "plan = load_plan(Path(sys.argv[2]))\n"
        "checkpoint = Checkpoint.open(Path(sys.argv[1]))\n"
        "files = converter.predict_files(checkpoint, plan.layout, plan.tensors, plan.serving)\n"
        "print(json.dumps([files, [name for name in ('torch', 'transformers', 'onnx_ir') if name in sys.modules]]))"
    )
    command = [sys.executable, "-c", script, export.model, export.bundle.path / "plan.json"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(done.stdout) == [predicted, []]


def test_what_has_no_place_in_the_graph_is_refused() -> None:
    checkpoint, decisions, serving = random_model(0, "llama")

    def build(decisions: tuple[TensorDecision, ...]) -> None:
        converter._graph(checkpoint, decisions, serving, converter.Options(), read_vector=None)

    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        with pytest.raises(UnsupportedError, match=f"decides nothing for {name}"):
            build(tuple(decision for decision in decisions if decision.name != name))
    with pytest.raises(UnsupportedError, match=r"no place for model\.extra\.weight"):
        build((*decisions, TensorDecision("model.extra.weight", (4, 4), "dense", 0, type="f32")))
    with pytest.raises(UnsupportedError, match="4 or 8 bits"):
        build(tuple(replace(d, type="int2") if "embed_tokens" in d.name else d for d in decisions))
    with pytest.raises(UnsupportedError, match="are f32, not f16"):
        build(tuple(replace(d, type="f16") if d.name == "model.norm.weight" else d for d in decisions))
