"""Scaled channels: the same function, and scores that say the same about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from acip_export.artifacts.bundle import Bundle, load_bundle
from acip_export.artifacts.names import WEIGHTS_FILE
from acip_export.artifacts.scores import ScoreFile
from acip_export.lowrank.moments import PackedMoment, pack_gradients, pack_moment
from acip_export.materialization import materialize_bundle
from acip_export.materialization.channel_scales import scale_channels
from acip_export.materialization.factors import Norm
from acip_export.model.checkpoint import Checkpoint
from converters.gguf.types import FEEDBACK_TYPES
from tests.support import dense, everywhere, make_model, make_plan, make_scores

IDS = torch.arange(40)[None]


def uneven(checkpoint: Checkpoint, scores: ScoreFile) -> ScoreFile:
    """Inputs of very different sizes, the same for layers that read the same; full moments of all."""
    generator = np.random.default_rng(0)
    kinds: dict[tuple[str, int], np.ndarray] = {}
    moments: dict[str, PackedMoment] = {}
    modules = {}
    for name, module in scores.modules.items():
        block, _, inner = name.rpartition(".")
        group = f"{block}.{inner}" if inner in ("o_proj", "down_proj") else block
        inputs = kinds.setdefault((group, module.shape[1]), generator.lognormal(0, 2, module.shape[1]))
        outputs = generator.lognormal(0, 1, module.shape[0])
        for key, diagonal in ((f"{group} in", inputs), (f"{name} out", outputs)):
            full = torch.from_numpy(0.3 * np.sqrt(np.outer(diagonal, diagonal)))
            full.diagonal().copy_(torch.from_numpy(diagonal))
            weight = checkpoint.read(f"{name}.weight")
            moments[key] = pack_moment(full) if diagonal is inputs else pack_gradients(full, weight)
        modules[name] = replace(
            module,
            input_moment=inputs.astype(np.float32),
            gradient_moment=outputs.astype(np.float32),
            input_key=f"{group} in",
            gradient_key=f"{name} out",
        )
    return replace(scores, modules=modules, second_moments=moments)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_bundle_is_the_same_function(arch: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", arch)
    plan = replace(make_plan(model, "gguf", "stock", dense(type="q8_0")), rounding="feedback")
    checkpoint = Checkpoint.open(model)
    scores = uneven(checkpoint, make_scores(model))
    materialize_bundle(checkpoint, scores, plan, tmp_path / "b", feedback_types=FEEDBACK_TYPES)
    bundle = Bundle.open(tmp_path / "b")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(IDS).logits
        found = load_bundle(bundle.path)(IDS).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    for name in ("input_layernorm", "mlp.up_proj", "mlp.down_proj", "self_attn.k_proj", "self_attn.v_proj"):
        assert not torch.equal(
            bundle.read(f"model.layers.1.{name}.weight"), checkpoint.read(f"model.layers.1.{name}.weight")
        )
    # Qwen 2 adds a bias to what v writes.
    assert (arch == "qwen2") == torch.equal(
        bundle.read("model.layers.1.self_attn.o_proj.weight"), checkpoint.read("model.layers.1.self_attn.o_proj.weight")
    )
    assert bundle.manifest.scores_sha256 == scores.sha256


def test_losses_are_those_of_the_model_as_it_is(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    checkpoint = Checkpoint.open(model)
    scores = uneven(checkpoint, make_scores(model, adapters=True))
    scaled, scaled_scores = scale_channels(checkpoint, scores)
    for name in (
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj",
    ):
        before, after = scores.modules[name], scaled_scores.modules[name]
        weights = checkpoint.read(f"{name}.weight").float(), scaled.read(f"{name}.weight")
        norms = (
            Norm.of(before, scores.second_moments, weights[0]),
            Norm.of(after, scaled_scores.second_moments, weights[1]),
        )
        adapters = [torch.from_numpy(m.adapter_b @ m.adapter_a) for m in (before, after)]  # type: ignore[operator]
        for one, other in (weights, adapters):
            # Up to what is added to the moments, as a share of their mean.
            assert norms[1].loss(other) == pytest.approx(norms[0].loss(one), rel=0.02)


def test_columns_become_of_one_size_but_for_outlying_inputs(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_model(tmp_path / "m"))
    scores = make_scores(checkpoint.path)
    name = "model.layers.0.mlp.down_proj"
    moment = np.ones(512, np.float32)
    moment[7] = 1e6
    modules = {**scores.modules, name: replace(scores.modules[name], input_moment=moment)}
    scaled, _ = scale_channels(checkpoint, replace(scores, modules=modules))
    before, after = (c.read(f"{name}.weight").float().square().mean(0).sqrt() for c in (checkpoint, scaled))
    ordinary = np.arange(512) != 7
    assert after[ordinary].log().std() < 0.3 * before[ordinary].log().std()
    assert 3 < after[7] / after[ordinary].median() < 10


def test_scaled_channels_need_no_scales(tmp_path: Path) -> None:
    """However a checkpoint shares sizes between tensors, what is rounded is the same."""
    checkpoint = Checkpoint.open(make_model(tmp_path / "m"))
    scaled, scores = scale_channels(checkpoint, uneven(checkpoint, make_scores(checkpoint.path)))
    again, _ = scale_channels(scaled, scores)
    assert len(again.scaled) == 2 * (7 + 2)
    for name in again.scaled:  # what it is scaled by, of the checkpoint's own
        torch.testing.assert_close(again.read(name), checkpoint.read(name), rtol=1e-4, atol=1e-7)


def test_what_is_left_alone(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    checkpoint = Checkpoint.open(model)
    scores = uneven(checkpoint, make_scores(model))
    floats = make_plan(model, "gguf", "stock", dense(type="bf16"))
    assert scale_channels(checkpoint, scores, floats)[0].scaled == frozenset()
    pairs = make_plan(
        model,
        "gguf",
        "factored",
        everywhere(representation="factored", rank=32, up_type="q8_0", down_type="q8_0", embedding_type="f16"),
    )
    assert scale_channels(checkpoint, scores, pairs)[0].scaled == frozenset()
    based = checkpoint.with_options({"base_gguf": "base.gguf"})
    assert scale_channels(based, scores)[0].scaled == frozenset()
    # Norms that add one, or come after what they would scale.
    for arch in ("gemma", "olmo2"):
        other = Checkpoint(checkpoint.path, {**checkpoint.config, "model_type": arch}, checkpoint.tensors)
        assert scale_channels(other, scores)[0].scaled == frozenset()
    nearest = make_plan(model, "gguf", "stock", dense(type="q8_0"))
    materialize_bundle(checkpoint, scores, nearest, tmp_path / "b", feedback_types=FEEDBACK_TYPES)
    stored = (tmp_path / "b" / WEIGHTS_FILE).stat().st_size
    assert abs(stored - checkpoint.weight_bytes) < 10_000
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(Bundle.open(tmp_path / "b").read(name), checkpoint.read(name))


def test_channels_that_were_never_excited(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    for moment in (0.0, np.r_[np.zeros(100), np.ones(156)]):
        modules = {
            name: replace(m, input_moment=np.broadcast_to(np.float32(moment), m.shape[1]).copy())
            for name, m in scores.modules.items()
            if not np.ndim(moment) or m.shape[1] == 256
        }
        scaled, _ = scale_channels(checkpoint, replace(scores, modules={**scores.modules, **modules}))
        weight = scaled.read("model.layers.0.self_attn.q_proj.weight")
        assert torch.isfinite(weight).all() and weight.abs().max() > 0
