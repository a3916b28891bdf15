"""KV caches of 8 and 4 bits: what the graph says, the scales that it is written with, and the runtimes that run it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import acip_export
from acip_export.api import export_model, open_scores, plan_export
from acip_export.api.cache_types import measured_cache_losses
from acip_export.artifacts.plan import Serving, load_plan
from acip_export.errors import UnsupportedError
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, resolve
from acip_export.progress import silent
from acip_export.verification.metrics import compare_logits
from converters.onnx import converter
from converters.onnx.companion_files import DATA_FILE, GENAI_CONFIG, MODEL_FILE
from converters.onnx.genai_builder import builder
from converters.onnx.genai_builder.module_tree import make_skeleton
from converters.onnx.graph.rounded_cache import attentions
from converters.onnx.run_commands import run_commands
from converters.onnx.runtimes.chat import GenaiChatSession
from converters.onnx.runtimes.genai import GenaiSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.onnx.conftest import SIZES
from tests.onnx.test_families import CASES
from tests.ranking.support import calibration_text
from tests.support import dense, make_bundle, make_model, make_plan, make_scores

CONTEXT, BATCH = 160, 32
WINDOWS = np.random.default_rng(1).integers(0, 512, (1, CONTEXT))
# Random weights attend to little in particular, and hardly notice.
MOST_KL = {"int8": 1e-4, "int4": 1e-2}
SAMPLE = Path(__file__).parents[2] / "samples" / "llama"


def written(model: Path, out: Path, cache_type: str, context: int = CONTEXT) -> tuple[Path, Serving]:
    """An export in floats but for its cache, as large as predicted."""
    plan = make_plan(model, "onnx", "factored", dense(type="f32"), context, BATCH)
    plan = replace(plan, serving=Serving(context, cache_type, BATCH))
    bundle = make_bundle(model, plan, out.with_name(f"{out.name}-bundle"))
    out.mkdir()
    converter.convert(bundle, out, silent)
    files = converter.predict_files(Checkpoint.open(model), plan.layout, plan.tensors, plan.serving)
    assert {name: (out / name).stat().st_size for name in files} == files
    return out, plan.serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", **SIZES)


def kl(exact: Path, rounded: Path, cache_type: str, context: int = CONTEXT) -> float:
    """What an export loses to another one, in plain onnxruntime."""
    found = []
    for export, kind in ((exact, "f32"), (rounded, cache_type)):
        with OnnxRuntimeSession(export, Serving(context, kind, BATCH), 1) as session:
            found.append(list(session.logits(WINDOWS[:, :context])))
    return compare_logits(found[0], iter(found[1]), ([], [])).mean_kl


def compare_with_floats(case: str, directory: Path) -> None:
    kind, settings = CASES[case]
    model = make_model(directory / "m", kind, **{**SIZES, **settings})
    exact, _ = written(model, directory / "f32", "f32")
    for cache_type, most in MOST_KL.items():
        export, serving = written(model, directory / cache_type, cache_type)
        assert 0 < kl(exact, export, cache_type) < most
        with OnnxRuntimeSession(export, serving, 1) as plain, GenaiSession(export, serving, 1) as genai:
            for own, others in zip(plain.logits(WINDOWS), genai.logits(WINDOWS), strict=True):
                np.testing.assert_array_equal(own, others)


def test_attention_computes_what_it_does_with_floats(tmp_path: Path) -> None:
    compare_with_floats("mistral, window", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", list({kind: case for case, (kind, _) in CASES.items()}.values()))
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_every_family_computes_what_it_does_with_floats(case: str, tmp_path: Path) -> None:
    compare_with_floats(case, tmp_path)


@pytest.mark.parametrize("cache_type", MOST_KL)
def test_one_cache_gives_what_past_and_present_apart_give(model: Path, cache_type: str, tmp_path: Path) -> None:
    """The model builder keeps them apart on processors, where a rounded cache would save half as much."""
    export, serving = written(model, tmp_path / "e", cache_type)
    file = export / GENAI_CONFIG
    config = json.loads(file.read_text())
    assert config["search"]["past_present_share_buffer"] is True
    prompt = [int(token) for token in WINDOWS[0][: BATCH + 5]]
    found: list[tuple[Any, list[int]]] = []
    for shared in (True, False):
        file.write_text(json.dumps({**config, "search": {**config["search"], "past_present_share_buffer": shared}}))
        with GenaiSession(export, serving, 1) as session:
            found.append((next(session.logits(WINDOWS)), session.greedy(prompt, 20)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(("cache_type", "scheme"), [("int8", "int8_per_channel"), ("int4", "int4_per_channel")])
def test_the_graph_is_the_model_builders(model: Path, cache_type: str, scheme: str, tmp_path: Path) -> None:
    export, _ = written(model, tmp_path / "e", cache_type)
    own = onnx.load(str(export / MODEL_FILE), load_external_data=False)
    checkpoint = Checkpoint.open(model)
    shape = checkpoint.shape
    scales = tmp_path / "scales.json"
    ones = [[1.0] * (shape.kv_heads * shape.head_dim)] * shape.layers
    scales.write_text(json.dumps({"scales": {"k_scales": ones, "v_scales": ones}}))
    theirs = builders_own(checkpoint, {"kv_cache_quant_scheme": scheme, "kv_cache_scale_file": str(scales)})
    # Once this fails, a rounded cache is shared by the builder too, and docs/memory.md has something to say.
    assert theirs.past_present_share_buffer is False
    graph = ir.serde.serialize_model(theirs.model).graph
    for ours, stock in zip(attentions(own), (n for n in graph.node if n.op_type == "GroupQueryAttention"), strict=True):
        assert list(ours.input)[3:5] + list(ours.input)[12:] == list(stock.input)[3:5] + list(stock.input)[12:]
        attributes = [
            {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if "quant" in a.name or "bit" in a.name}
            for node in (ours, stock)
        ]
        assert attributes[0] == attributes[1] and len(attributes[0]) == 3
    caches = [
        {
            value.name: (value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim[-1].dim_value)
            for value in (*each.input, *each.output)
            if value.name.startswith(("past", "present"))
        }
        for each in (own.graph, graph)
    ]
    if cache_type == "int8":  # the builder leaves the width of a head open there
        caches[1] = {name: (kind, shape.head_dim) for name, (kind, _) in caches[1].items()}
    assert caches[0] == caches[1] and len(caches[0]) == 4 * shape.layers


def builders_own(checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    """A model of the builder's for processors, finished."""
    adapted: list[Any] = []
    module = builder._builders()
    base = module.LlamaModel

    class Asked(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            *rest, extra = args
            super().__init__(*rest, {**extra, **options})
            adapted.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LlamaModel", Asked)
        # What the adapter says of shapes is for caches in floats.
        patch.setattr(builder, "_configure", lambda *_: None)
        builder.build_marked(make_skeleton(dict(checkpoint.config), False, CONTEXT, None), "cpu")
    return adapted[0]


def scales_of(export: Path, layers: int, width: int) -> Iterator[tuple[Any, Any]]:
    """Of keys and of values, by layer."""
    numbers = np.frombuffer((export / DATA_FILE).read_bytes()[-layers * 2 * width * 4 :], np.float32)
    return ((keys, values) for keys, values in numbers.reshape(layers, 2, width))


def test_scales_are_those_of_what_the_model_writes(model: Path, tmp_path: Path) -> None:
    shape = Checkpoint.open(model).shape
    width = shape.kv_heads * shape.head_dim
    found = {}
    for cache_type in MOST_KL:
        export, _ = written(model, tmp_path / cache_type, cache_type)
        found[cache_type] = list(scales_of(export, shape.layers, width))
        again, _ = written(model, tmp_path / f"{cache_type}-again", cache_type)
        assert (again / DATA_FILE).read_bytes() == (export / DATA_FILE).read_bytes()
    for (keys, values), (coarse, _) in zip(found["int8"], found["int4"], strict=True):
        assert len(set(values.tolist())) == width and values.min() > 1e-6
        # Channels that a position turns into each other share their steps, which are wider in 4 bits.
        one, other = keys.reshape(shape.kv_heads, 2, -1).swapaxes(0, 1)
        np.testing.assert_array_equal(one, other)
        assert (coarse > 5 * keys).all()
    # Without them everything is rounded away: the test of families would show it.
    exact, _ = written(model, tmp_path / "f32", "f32")
    data = (tmp_path / "int8" / DATA_FILE).read_bytes()
    size = shape.layers * 2 * width * 4
    (tmp_path / "int8" / DATA_FILE).write_bytes(data[:-size] + np.ones(size // 4, np.float32).tobytes())
    assert kl(exact, tmp_path / "int8", "int8") > MOST_KL["int8"]


@pytest.mark.slow
def test_an_export_with_a_rounded_cache(model: Path, tmp_path: Path) -> None:
    """Planned, written, verified, and told to whom it is of use."""
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    request = PlanRequest("onnx", 10**8, types=("f32",), context=CONTEXT, prompt_batch=BATCH)
    floats, plan = (plan_export(checkpoint, scores, replace(request, cache_type=name)) for name in ("f32", "int4"))
    assert plan.breakdown["kv_cache"] * 8 == floats.breakdown["kv_cache"]
    assert any("transformers.js and optimum make theirs in floats" in note for note in plan.notes)
    assert [command.program for command in run_commands(plan, tmp_path)] == ["onnxruntime-genai"]
    report = export_model(checkpoint, scores, plan, tmp_path / "e")
    assert report is not None and report.passed
    assert load_plan(tmp_path / "e" / "plan.json").serving.cache_types == "int4"
    assert "transformers.js_config" not in json.loads((tmp_path / "e" / "config.json").read_text())
    # A conversation goes back in one cache.
    with GenaiChatSession(tmp_path / "e", plan.serving, 1) as chat:
        first = chat.extend([5, 6, 7, 8])
        chat.rewind(2)
        np.testing.assert_allclose(chat.extend([7, 8]), first, atol=1e-5)


def test_what_has_no_rounded_cache(tmp_path: Path) -> None:
    onnx_format = export_format("onnx")
    traced = Checkpoint.open(make_model(tmp_path / "t", "stablelm"))
    asked = PlanRequest("onnx", 10**8, cache_type="int8")
    with pytest.raises(UnsupportedError, match=r"no KV cache of int8: the graph of a StableLm\S+ is traced"):
        resolve(asked, traced)
    assert "one type" in str(onnx_format.refused_cache(Checkpoint.open(SAMPLE), "int8", "f32"))
    assert resolve(replace(asked, cache_type="auto"), traced).caches == (("f32", "f32"),)


@pytest.mark.slow
def test_the_best_of_cache_and_weights(tmp_path: Path) -> None:
    """Each type is measured in an export of its own, and the budget decides."""
    text = calibration_text(tmp_path / "text.txt")
    acip_export.rank(SAMPLE, text, out=tmp_path / "m.acip", algorithm="magnitude", context=128)
    checkpoint = Checkpoint.open(SAMPLE)
    scores = open_scores(checkpoint, tmp_path / "m.acip")
    request = PlanRequest("onnx", 10**9, context=512, prompt_batch=16, cache_type="auto", types=("int8", "int4"))
    losses = measured_cache_losses(
        checkpoint, scores, resolve(request, checkpoint).space, ("f32", "int8", "int4"), silent
    )
    assert losses.keys == losses.values
    assert 0 == losses.keys["f32"] < losses.keys["int8"] < 0.002 < losses.keys["int4"] < 0.1
    assert plan_export(checkpoint, scores, request).serving.cache_types == "f32"
    smallest = plan_export(checkpoint, scores, replace(request, cache_type="int4", types=("int4",)))
    tight = replace(request, budget_bytes=smallest.used_bytes + 10_000)
    assert plan_export(checkpoint, scores, tight).serving.cache_types == "int4"
