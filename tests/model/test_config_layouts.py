"""Every family in each layout of config.json that lies on the Hub: files as planned, logits as transformers'.

transformers 4 wrote ``rope_theta`` and ``rope_scaling``, transformers 5 writes ``rope_parameters``, for Gemma 3 by kind
of layer. It rewrites what it is given, so that a plan could be one of another configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from acip_export import api
from acip_export.artifacts.plan import Serving
from acip_export.errors import UnsupportedError
from acip_export.model.architectures import ARCHITECTURES
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.support import make_model, make_scores

CONTEXT = 48
# Far from every default.
THETA = 50.0
# Sums in another order; ggml multiplies with the head in float16, and takes GELU from a table of float16 values.
TOLERANCE, GELU_TOLERANCE = 5e-4, 3e-3
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
WINDOWS = np.random.default_rng(0).integers(3, 512, (1, CONTEXT))
ROPE_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
# All texts of these tests are longer than the original positions: runtimes choose the factors once.
LONG = {"short_factor": [1.0 + i for i in range(8)], "long_factor": [1.5 + i for i in range(8)]}
GEMMA3 = {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def old(kind: str, key: str = "rope_type", **fields: Any) -> dict[str, Any]:
    return {"rope_theta": THETA, "rope_scaling": {key: kind, **fields}}


def new(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": THETA, "rope_type": kind, **fields}}


PLAIN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "rope_theta": {"rope_theta": THETA, "rope_scaling": None},
    "rope_parameters": new("default"),
}
# model_type -> name -> keys of config.json.
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("mistral", "gemma", "gemma2", "olmo2", "smollm3"), PLAIN),
    "llama": PLAIN
    | {
        "old linear, type": old("linear", "type", factor=4.0),
        "old llama3": old("llama3", **LLAMA3),
        "new llama3": new("llama3", **LLAMA3),
        "old yarn": old("yarn", **YARN),
        "new yarn": new("yarn", **YARN),
        "yarn, its own attention factor": old("yarn", **YARN, attention_factor=1.5),
        "yarn, mscale": old("yarn", **YARN, mscale=3.0, mscale_all_dim=0.5),
        "yarn, the original length left out": old("yarn", factor=4.0),
        "both, which differ": {**old("linear", factor=4.0), **new("llama3", **LLAMA3)},
        "partial_rotary_factor, which Llama ignores": {"rope_theta": THETA, "partial_rotary_factor": 0.5},
        "partial_rotary_factor among the parameters": new("default", partial_rotary_factor=0.5),
    },
    "qwen2": PLAIN | {"old yarn, type": old("yarn", "type", **YARN), "old dynamic": old("dynamic", "type", factor=2.0)},
    "qwen3": PLAIN | {"old yarn": old("yarn", **YARN), "new yarn": new("yarn", **YARN)},
    "ernie4_5": PLAIN | {"old linear": old("linear", factor=4.0), "new yarn": new("yarn", **YARN)},
    "granite": PLAIN | {"old linear": old("linear", factor=4.0)},
    "phi3": PLAIN
    | {
        "old longrope": {**old("longrope", "type", **LONG), "original_max_position_embeddings": 16},
        "old yarn, which is longrope": {**old("yarn", "type", **LONG), "original_max_position_embeddings": 16},
        "new longrope": {**new("longrope", **LONG), "original_max_position_embeddings": 16},
        "longrope, a length beside the factors, which Phi 3 ignores": new(
            "longrope", **LONG, original_max_position_embeddings=16
        ),
        "partial_rotary_factor": {"rope_theta": THETA, "partial_rotary_factor": 0.5},
        "partial_rotary_factor among the parameters": new("default", partial_rotary_factor=0.5),
    },
    "gemma3_text": {
        "nothing": {},
        "old": {"rope_theta": 5e5, "rope_local_base_freq": THETA, "rope_scaling": None},
        "old linear": {"rope_theta": 5e5, "rope_local_base_freq": THETA, "rope_scaling": LINEAR},
        "by kind of layer": {
            "rope_parameters": {
                "full_attention": {"rope_theta": 5e5, **LINEAR},
                "sliding_attention": {"rope_type": "default", "rope_theta": THETA},
            }
        },
        "one kind only": {"rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}},
        "flat, which Gemma 3 ignores": new("default"),
    },
}
CASES = [(kind, layout) for kind, layouts in LAYOUTS.items() for layout in layouts]


SETTINGS: dict[str, dict[str, Any]] = {
    "gemma3_text": GEMMA3,
    "gemma2": {"query_pre_attn_scalar": 16},
    "olmo2": {"tie_word_embeddings": False},
}


def hub_model(directory: Path, kind: str, layout: str) -> Path:
    """Weights that float16 holds exactly, whatever the layout."""
    make_model(directory, kind, seed=1, dtype=torch.float16, **SIZES, **SETTINGS.get(kind, {}))
    if kind == "gemma":  # attention so flat that positions would hardly show
        tensors = load_file(directory / "model.safetensors")
        sharper = {name: 16 * tensor if "k_proj" in name else tensor for name, tensor in tensors.items()}
        save_file(sharper, directory / "model.safetensors", {"format": "pt"})
    write_layout(directory, kind, layout)
    return directory


def write_layout(model: Path, kind: str, layout: str) -> None:
    file = model / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in ROPE_KEYS}
    file.write_text(json.dumps({**config, **LAYOUTS[kind][layout]}, indent=2))


def reference(model: Path) -> torch.Tensor:
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return dense(torch.from_numpy(WINDOWS)).logits[0]


def tolerance(kind: str) -> float:
    return GELU_TOLERANCE if kind.startswith("gemma") else TOLERANCE


def planned_and_written(model: Path, file_format: str, out: Path) -> Path:
    """Through the main job, which refuses files that are not as planned."""
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    cache = "f16" if file_format == "gguf" else "f32"
    request = PlanRequest(file_format, 10**9, types=("f32",), layout=None, context=CONTEXT, cache_type=cache)
    plan = api.plan_export(checkpoint, scores, request)
    assert plan.model_fingerprint == checkpoint.fingerprint == Checkpoint.open(model).fingerprint
    api.export_model(checkpoint, scores, plan, out, verify=False)
    return out


def test_every_family_has_its_layouts() -> None:
    assert set(LAYOUTS) == {kind for kind, row in ARCHITECTURES.items() if row.layer}


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["gguf", "onnx"])
@pytest.mark.parametrize(("kind", "layout"), CASES)
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_exports_compute_as_transformers_does(kind: str, layout: str, file_format: str, tmp_path: Path) -> None:
    model = hub_model(tmp_path / "model", kind, layout)
    if (layout, file_format) == ("old dynamic", "gguf"):
        with pytest.raises(UnsupportedError, match="no rotary embedding 'dynamic'"):
            planned_and_written(model, file_format, tmp_path / "out")
        return
    out = planned_and_written(model, file_format, tmp_path / "out")
    serving = Serving(CONTEXT, "f32", 16)
    if file_format == "gguf":
        with LlamaCppSession(out, serving, threads=1, flash_attention=False) as session:
            found = next(iter(session.logits(WINDOWS)))
    else:
        with OnnxRuntimeSession(out, serving, threads=1) as session:
            found = next(iter(session.logits(WINDOWS)))
    assert np.abs(found - reference(model).numpy()).max() <= tolerance(kind)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_the_layouts_of_a_family_differ(kind: str, tmp_path: Path) -> None:
    """Else the test above could not tell whether they are read."""
    model = hub_model(tmp_path / "model", kind, "nothing")
    found: dict[str, torch.Tensor] = {}
    for layout in LAYOUTS[kind]:
        write_layout(model, kind, layout)
        found[layout] = reference(model)
    for layout in LAYOUTS[kind]:
        if layout != "nothing" and "ignores" not in layout:
            assert (found[layout] - found["nothing"]).abs().max() > 3 * tolerance(kind), layout
