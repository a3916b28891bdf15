"""Exports against the bundle in PyTorch, and against the bytes that were promised."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from acip_export.artifacts.bundle import Bundle, load_bundle
from acip_export.artifacts.materialized import stored_tensors
from acip_export.artifacts.plan import Serving
from acip_export.errors import UnsupportedError
from acip_export.formats.session import Logits, Windows
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Progress
from acip_export.rounding import side_by_side
from acip_export.weight_types import weight_type
from converters.onnx import converter
from converters.onnx.companion_files import DATA_FILE, MODEL_FILE
from converters.onnx.quantize import dequantize, quantize
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.onnx.conftest import CONTEXT, EXACT, PROMPT_BATCH, RULES, Export, MakeExport
from tests.support import dense, make_bundle, make_model, make_plan

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
WINDOWS: Windows = np.random.default_rng(0).integers(0, 512, (2, CONTEXT))


def difference(export: Export, reference: torch.nn.Module) -> float:
    """Largest difference of logits over windows that cross prompt batches."""

    def logits() -> list[Logits]:
        with torch.no_grad():
            return list(reference(input_ids=torch.from_numpy(WINDOWS)).logits.numpy())

    expected = logits()
    # The tolerances below mean something only if the logits are of this order.
    assert 0.1 < np.std(expected) < 10
    with OnnxRuntimeSession(export.path, export.bundle.plan.serving, threads=1) as session:
        return max(float(np.abs(a - b).max()) for a, b in zip(expected, session.logits(WINDOWS), strict=True))


@pytest.mark.parametrize(
    ("arch", "tied"), [*((arch, False) for arch in ARCHITECTURES), ("llama", True), ("qwen3", True)]
)
@pytest.mark.parametrize("rule", ["dense f32", "factored f32"])
def test_float_exports_agree_with_the_bundle(make_export: MakeExport, arch: str, rule: str, tied: bool) -> None:
    export = make_export(arch, tied, rule)
    # DESIGN's bar; float32 sums in another order give about 1e-6 here.
    assert difference(export, load_bundle(export.bundle.path)) <= 1e-5
    assert export.written == export.predicted()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rule", ["int8", "int4", "int2", "int4, float embedding", "mixed", "asymmetric"])
def test_rounded_exports_agree_with_our_dequantized_weights(make_export: MakeExport, rule: str, tied: bool) -> None:
    export = make_export("llama", tied, rule)
    # Both sides multiply the same numbers; a code or scale in the wrong place costs a tenth of the logits' spread.
    assert difference(export, dequantized(export.bundle)) <= 1e-4
    assert export.written == export.predicted()


def dequantized(bundle: Bundle) -> torch.nn.Module:
    """The bundle's model with every matrix as the runtime sees it."""
    model = load_bundle(bundle.path)
    state = model.state_dict()
    for decision in bundle.plan.tensors:
        names = list(stored_tensors(decision.name, decision.shape, decision.rank))
        formats = [decision.type] if decision.rank is None else [decision.up_type, decision.down_type]
        for name, format_name in zip(names, formats, strict=True):
            fmt = weight_type("onnx", str(format_name))
            if len(decision.shape) == 2 and not fmt.is_float:
                weight, moments = bundle.read(name).float().numpy(), bundle.importance(name)
                importance = None if moments is None else moments.numpy()
                rounded = dequantize(quantize(weight, fmt, importance), fmt, weight.shape[1])
                state[name].copy_(torch.from_numpy(rounded))
    return model


def test_int8_activations_stay_close(make_export: MakeExport, tmp_path: Path) -> None:
    bundle = make_export("llama", True, "int8").bundle
    converter.convert(bundle, tmp_path, lambda _: None)
    # The default: activations rounded to int8 in blocks, a relative error of about 1e-2.
    export = Export(tmp_path, tmp_path, bundle)
    assert 1e-4 < difference(export, dequantized(bundle)) <= 0.2


def test_biases_of_every_projection(tmp_path: Path) -> None:
    model = make_model(
        tmp_path / "m", "llama", hidden_size=64, intermediate_size=96, attention_bias=True, mlp_bias=True
    )
    bundle = make_bundle(model, make_plan(model, "onnx", "factored", RULES["factored f32"]), tmp_path / "b")
    (tmp_path / "e").mkdir()
    converter.convert(bundle, tmp_path / "e", lambda _: None)
    assert difference(Export(tmp_path / "e", model, bundle), load_bundle(bundle.path)) <= 1e-5


def test_a_bias_of_zeros_keeps_its_place(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "qwen2", hidden_size=64, intermediate_size=96)
    zero_biases(model)
    bundle = make_bundle(model, make_plan(model, "onnx", "factored", dense(type="f32")), tmp_path / "b")
    (tmp_path / "e").mkdir()
    converter.convert(bundle, tmp_path / "e", lambda _: None)
    export = Export(tmp_path / "e", model, bundle)
    assert export.written == export.predicted()
    assert difference(export, load_bundle(bundle.path)) <= 1e-5


def zero_biases(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    zeroed = {name: t * 0 if name.endswith(".bias") else t for name, t in tensors.items()}
    save_file(zeroed, model / "model.safetensors", {"format": "pt"})


def test_data_holds_every_initializer_once(make_export: MakeExport) -> None:
    for rule in ("dense f32", "int4"):
        export = make_export("llama", True, rule)
        initializers = onnx.load(export.path / MODEL_FILE, load_external_data=False).graph.initializer
        places = [{e.key: e.value for e in tensor.external_data} for tensor in initializers]
        assert sum(int(place["length"]) for place in places) == export.written[DATA_FILE]
        tables = 2 * CONTEXT * 16 * 4
        assert export.written[DATA_FILE] == sum(d.nbytes for d in export.bundle.plan.tensors) + tables


@pytest.mark.parametrize("at_once", [1, 2])
def test_converting_again_gives_the_same_bytes(
    make_export: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """However many matrices are rounded at once."""
    monkeypatch.setattr(side_by_side, "_SIDE_BY_SIDE", at_once)
    export = make_export("llama", False, "mixed")
    steps: list[Progress] = []
    converter.convert(export.bundle, tmp_path, steps.append, EXACT)
    assert digest(tmp_path) == digest(export.path)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == steps[-1].total == export.written[DATA_FILE]


def digest(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_prediction_follows_context(make_export: MakeExport) -> None:
    export = make_export("llama", True, "int4")
    checkpoint, plan = Checkpoint.open(export.model), export.bundle.plan
    longer = converter.predict_files(checkpoint, "factored", plan.tensors, replace(plan.serving, context=256))
    assert longer[DATA_FILE] - export.written[DATA_FILE] == 2 * (256 - CONTEXT) * 16 * 4


def test_every_consumer_is_told_the_same(make_export: MakeExport) -> None:
    export = make_export("qwen3", True, "dense f32")
    config, genai, tokenizer = (
        json.loads((export.path / name).read_text())
        for name in ("config.json", "genai_config.json", "tokenizer_config.json")
    )
    assert config["max_position_embeddings"] == tokenizer["model_max_length"] == CONTEXT
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == CONTEXT
    assert genai["search"]["chunk_size"] == PROMPT_BATCH
    assert genai["model"]["eos_token_id"] == config["eos_token_id"]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (export.path / genai["model"]["decoder"]["filename"]).is_file()
    cache = next(
        i for i in onnx.load(export.path / MODEL_FILE, load_external_data=False).graph.input if "key" in i.name
    )
    # transformers.js reads a symbolic last dimension as zero.
    assert cache.type.tensor_type.shape.dim[3].dim_value == 32


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"model_type": "spiral"}, "knows no model_type 'spiral'"),
    "rope": ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "cannot build a llama model"),
    "more layers": ({"num_hidden_layers": 3}, "model.layers.2"),
    "fewer layers": ({"num_hidden_layers": 1}, "model.layers.1"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_models_say_so(make_export: MakeExport, case: str) -> None:
    export = make_export("llama", True, "dense f32")
    changes, message = UNSUPPORTED[case]
    checkpoint = Checkpoint(export.model, {**Checkpoint.open(export.model).config, **changes}, {})
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        converter.predict_files(checkpoint, "factored", export.bundle.plan.tensors, export.bundle.plan.serving)


def test_unsupported_decisions_say_so(make_export: MakeExport, tmp_path: Path) -> None:
    export = make_export("llama", True, "dense f32")
    checkpoint, plan = Checkpoint.open(export.model), export.bundle.plan

    def predict(layout: str = "factored", serving: Serving = plan.serving, **fields: Any) -> None:
        tensors = tuple(replace(d, **fields) if "embed" in d.name else d for d in plan.tensors)
        converter.predict_files(checkpoint, layout, tensors, serving)

    pair = {"rank": 32, "up_type": "f32", "down_type": "f32"}
    for message, call in {
        "no layout 'stock'": lambda: predict("stock"),
        "--cache-type f32": lambda: predict(serving=Serving(CONTEXT, "q8_0", 16)),
        "embeddings are dense": lambda: predict(type="int2"),
        "no adapters": lambda: predict(representation="lora", **pair),
        "embeddings are dense, ": lambda: predict(representation="factored", type=None, **pair),
        "no weight format 'q4_0'": lambda: predict(type="q4_0"),
        "is planned as uint2-b16: onnxruntime has no kernel": lambda: predict(type="uint2-b16"),
    }.items():
        with pytest.raises(UnsupportedError, match=re.escape(message)):
            call()
    bare = Checkpoint(tmp_path, checkpoint.config, {})
    with pytest.raises(UnsupportedError, match=re.escape("no tokenizer.json")):
        converter.predict_files(bare, "factored", plan.tensors, plan.serving)
