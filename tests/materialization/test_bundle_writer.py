from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from acip_export.api import convert_bundle
from acip_export.artifacts.bundle import Bundle, load_bundle
from acip_export.artifacts.names import IMPORTANCE_FILE, MANIFEST_FILE, WEIGHTS_FILE
from acip_export.artifacts.scores import RankedModel, ScoreFile
from acip_export.errors import BundleError, CheckpointError, PlanFileError, ScoreFileError, UsageError
from acip_export.lowrank.components import components
from acip_export.materialization import materialize_bundle
from acip_export.materialization.factors import basis_moments, dense_weight, factor_pair
from acip_export.model.checkpoint import Checkpoint
from converters.onnx.converter import round_trip
from tests.support import dense, everywhere, make_bundle, make_model, make_plan, make_scores

IDS = torch.arange(40)[None]
# float32 sums over 512 inputs through two layers, in another order.
FLOAT = {"atol": 2e-4, "rtol": 1e-4}


def _dense_logits(model: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(IDS).logits


def _bundle_logits(bundle: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_bundle(bundle)(IDS).logits


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_everything_kept_is_the_dense_model(arch: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", arch, tie_word_embeddings=arch != "qwen2")
    plan = make_plan(model, "onnx", "factored", lambda name, shape: _full_rank(name, shape))
    bundle = make_bundle(model, plan, tmp_path / "b")
    torch.testing.assert_close(_bundle_logits(bundle.path), _dense_logits(model), **FLOAT)


def _full_rank(name: str, shape: tuple[int, ...]) -> dict[str, object]:
    if "embed" in name or "lm_head" in name:
        return {"representation": "dense", "type": "f32"}
    return {"representation": "factored", "rank": min(shape), "up_type": "f32", "down_type": "f32"}


def test_dense_weights_are_copied_to_the_bit(model: Path, tmp_path: Path) -> None:
    bundle = make_bundle(model, make_plan(model, "onnx", "factored", dense(type="f32")), tmp_path / "b")
    written, original = load_file(bundle.path / WEIGHTS_FILE), load_file(model / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)


def test_adapters_are_folded_into_the_pair(model: Path, tmp_path: Path) -> None:
    """At full rank nothing is cut off, so the folded pair must be the weight plus the adapter exactly."""
    scores = make_scores(model, tmp_path / "s.acip", adapters=True)
    plan = make_plan(model, "onnx", "factored", _full_rank, adapters=True)
    bundle = make_bundle(model, plan, tmp_path / "b", scores)
    name = "model.layers.0.self_attn.q_proj"
    module = scores.modules[name]
    expected = Checkpoint.open(model).read(f"{name}.weight") + torch.tensor(module.adapter_b @ module.adapter_a)
    pair = bundle.read(f"{name}.up.weight") @ bundle.read(f"{name}.down.weight")
    torch.testing.assert_close(pair, expected, atol=1e-5, rtol=1e-4)
    dense_plan = replace(make_plan(model, "onnx", "factored", dense(type="f32")), adapters=True)
    dense_bundle = make_bundle(model, dense_plan, tmp_path / "d", scores)
    torch.testing.assert_close(_bundle_logits(bundle.path), _bundle_logits(dense_bundle.path), **FLOAT)
    assert not torch.allclose(_bundle_logits(bundle.path), _dense_logits(model), atol=1e-2)


def test_adapters_scaled_by_what_is_dropped(model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    weight = Checkpoint.open(model).read(f"{name}.weight")
    scores = make_scores(model, tmp_path / "s.acip", adapters=True)
    module = replace(scores.modules[name], adapter_scaling="dropped")
    assert module.adapter_b is not None and module.adapter_a is not None
    assert torch.equal(dense_weight(weight, module, adapters=True), weight)
    moments, count = basis_moments(scores, module, weight), min(module.shape)
    everything = factor_pair(weight, module, moments, ((0, count),), adapters=True)
    torch.testing.assert_close(everything.up @ everything.down, weight, atol=1e-5, rtol=1e-4)
    for kept in (count * 3 // 4, count // 4):
        share = np.float32(2 * (1 - kept / count))
        constant = replace(module, adapter_b=share * module.adapter_b, adapter_scaling="constant")
        scaled, same = (factor_pair(weight, m, moments, ((0, kept),), adapters=True) for m in (module, constant))
        torch.testing.assert_close(scaled.up @ scaled.down, same.up @ same.down, atol=0, rtol=0)


def test_a_correction_is_fitted_to_the_types_of_the_plans_format(model: Path, tmp_path: Path) -> None:
    fields = {"representation": "residual", "rank": 16, "up_type": "int8", "down_type": "int8"}
    plan = make_plan(model, "onnx", "factored", everywhere(type="int2", embedding_type="f32", **fields))
    checkpoint, name = Checkpoint.open(model), "model.layers.0.mlp.up_proj.weight"
    materialize_bundle(checkpoint, make_scores(model), plan, tmp_path / "b", round_trip=round_trip)
    bundle = Bundle.open(tmp_path / "b")
    base, pair = bundle.read(name), [bundle.read(name.replace("weight", f"{s}.weight")) for s in ("up", "down")]
    alone, corrected = (
        (checkpoint.read(name) - rounded).square().mean()
        for rounded in (
            round_trip(checkpoint.read(name), "int2", None),
            round_trip(base, "int2", None) + round_trip(pair[0], "int8", None) @ round_trip(pair[1], "int8", None),
        )
    )
    assert corrected < 0.95 * alone


def test_whitened_components_are_optimal_in_their_norm() -> None:
    """Half the squared singular value is the loss 1/2 tr(G dW H dW^T) of dropping that component, and only that."""
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    x, g = torch.randn(500, 40) @ torch.randn(40, 40), torch.randn(500, 24) @ torch.randn(24, 24)
    inputs, gradients = (x.T @ x / 500).double(), (g.T @ g / 500).double()
    basis = components(weight, inputs, gradients)
    torch.testing.assert_close(basis.up @ basis.down, weight, atol=1e-3, rtol=1e-3)
    for dropped in ([3], [0, 7, 20]):
        change = (basis.up[:, dropped] @ basis.down[dropped]).double()
        loss = 0.5 * torch.trace(gradients @ change @ inputs @ change.T)
        # The damping that keeps the roots finite adds its share of 1e-4.
        assert float(loss) == pytest.approx(0.5 * float(basis.singular[dropped].square().sum()), rel=5e-3)


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rule = everywhere(representation="factored", rank=32, up_type="int8", down_type="int8", embedding_type="int8")
    out = tmp_path_factory.mktemp("bundles") / "b"
    return make_bundle(model, make_plan(model, "onnx", "factored", rule), out).path


def test_importance_of_the_inner_dimension(bundle: Path) -> None:
    """With unit input moments, down(x) has the moments of down's squared rows."""
    opened = Bundle.open(bundle, verify_hash=True)
    down = opened.read("model.layers.0.mlp.up_proj.down.weight")
    importance = opened.importance("model.layers.0.mlp.up_proj.up.weight")
    assert importance is not None
    torch.testing.assert_close(importance, down.square().sum(1), atol=1e-6, rtol=1e-4)
    assert opened.importance("model.embed_tokens.weight") is None


def _truncated(path: Path) -> None:
    file = path / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-10])


def _flipped(path: Path, name: str = WEIGHTS_FILE) -> None:
    data = bytearray((path / name).read_bytes())
    data[-3] ^= 255
    (path / name).write_bytes(data)


def _flipped_importance(path: Path) -> None:
    _flipped(path, IMPORTANCE_FILE)


def _no_importance(path: Path) -> None:
    (path / IMPORTANCE_FILE).unlink()


def _older(path: Path) -> None:
    (path / MANIFEST_FILE).write_text('{"artifact": "acip-bundle", "version": 2, "weights_sha256": ""}')


def _other_shape(path: Path) -> None:
    tensors = load_file(path / WEIGHTS_FILE)
    tensors["model.layers.0.mlp.up_proj.up.weight"] = torch.zeros(512, 31)
    save_file(tensors, path / WEIGHTS_FILE)


def _no_manifest(path: Path) -> None:
    (path / MANIFEST_FILE).unlink()


def _newer(path: Path) -> None:
    file = path / MANIFEST_FILE
    file.write_text(file.read_text().replace('"version": 3', '"version": 7'))


def _not_json(path: Path) -> None:
    (path / MANIFEST_FILE).write_text("{")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_truncated, "truncated"),
        (_flipped, "SHA-256 differs"),
        (_flipped_importance, "importance.safetensors has changed"),
        (_no_importance, "has no importance.safetensors"),
        (_older, "of version 2, this tool reads 3"),
        (_other_shape, "the plan expects"),
        (_no_manifest, "no bundle"),
        (_newer, "version 7"),
        (_not_json, "damaged"),
    ],
)
def test_damaged_bundles(harm: object, says: str, bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
    assert callable(harm)
    harm(copy)
    with pytest.raises(BundleError, match=says):
        Bundle.open(copy, verify_hash=True)
    out = tmp_path / "export"
    with pytest.raises(BundleError, match=says):
        convert_bundle(copy, out)
    assert not out.exists()


def test_refusals_leave_nothing_behind(model: Path, tmp_path: Path) -> None:
    scores: ScoreFile = make_scores(model, tmp_path / "s.acip")
    plan = make_plan(model, "onnx", "factored", dense(type="f32"))
    checkpoint = Checkpoint.open(model)
    out = tmp_path / "out" / "b"
    with pytest.raises(PlanFileError, match="was made for"):
        materialize_bundle(checkpoint, scores, replace(plan, model_fingerprint="0"), out)
    with pytest.raises(PlanFileError, match="differs"):
        materialize_bundle(checkpoint, scores, replace(plan, tensors=plan.tensors[1:]), out)
    with pytest.raises(ScoreFileError):
        materialize_bundle(checkpoint, replace(scores, model=RankedModel("x", "0")), plan, out)
    broken = make_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 7] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    broken_plan = make_plan(broken, "onnx", "factored", dense(type="f32"))
    with pytest.raises(CheckpointError, match="NaN"):
        materialize_bundle(
            Checkpoint.open(broken),
            replace(scores, model=RankedModel("x", Checkpoint.open(broken).fingerprint)),
            broken_plan,
            out,
        )
    assert not out.exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    out.mkdir(parents=True)
    (out / "precious").write_text("data")
    with pytest.raises(UsageError, match="already exists"):
        materialize_bundle(checkpoint, scores, plan, out)
    assert (out / "precious").read_text() == "data"
