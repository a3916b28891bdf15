"""The second moments are what they claim to be, and what is predicted from them is what happens."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acip_export.errors import UnsupportedError
from acip_export.lowrank.components import components
from acip_export.lowrank.losses import component_losses, dense_sensitivity
from acip_export.lowrank.moments import PackedMoment
from acip_export.ranking import statistics
from acip_export.ranking.factorized_model import factorize_model
from acip_export.ranking.mask_gradients import component_fisher
from acip_export.ranking.statistics import Statistics, collect_statistics
from acip_export.ranking.stored_moments import StoredMoments
from acip_export.ranking.vocabulary import draw
from tests.ranking.support import CALIBRATION, context_of, sharp_model

CPU = torch.device("cpu")


def input_of(statistics: Statistics, name: str) -> Tensor:
    return statistics.inputs[statistics.input_keys[name]]


def gradient_of(statistics: Statistics, name: str) -> Tensor:
    return statistics.gradients[statistics.gradient_keys[name]]


class Ranked:
    """A loaded model with its statistics, and the measured KL divergence per token of anything done to it."""

    def __init__(self, path: Path, text: Path) -> None:
        self.context = context_of(path, text, calibration=replace(CALIBRATION, seed=1))
        self.checkpoint, self.model, self.windows = self.context.checkpoint, self.context.model, self.context.windows
        self.probe = self.windows[:32]
        self.statistics: Statistics = collect_statistics(self.context)
        self.dense = self.logits()

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model(input_ids=self.probe).logits.double().log_softmax(-1).flatten(0, 1)

    def divergence(self) -> float:
        return float(F.kl_div(self.logits(), self.dense, reduction="batchmean", log_target=True))

    @contextmanager
    def changed(self, tensor: str, change: Tensor) -> Iterator[None]:
        parameter = self.model.get_parameter(tensor)
        before = parameter.data.clone()
        parameter.data += change
        yield
        parameter.data.copy_(before)


@pytest.fixture(scope="module")
def ranked(model: Path, text: Path) -> Ranked:
    return Ranked(model, text)


def test_moments_are_token_averages(ranked: Ranked) -> None:
    seen: list[Tensor] = []
    layer = ranked.model.get_submodule("model.layers.1.mlp.down_proj")
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        ranked.model(input_ids=ranked.windows)
    handle.remove()
    rows = seen[0].double()
    expected, name = rows.T @ rows / len(rows), "model.layers.1.mlp.down_proj"
    exact = torch.from_numpy(ranked.statistics.inputs.diagonal(f"{name}.input")).double()
    torch.testing.assert_close(exact, expected.diagonal(), rtol=1e-4, atol=1e-5)
    # What the score file has of it.
    assert float((input_of(ranked.statistics, name) - expected).norm() / expected.norm()) < 0.03


def test_modules_that_read_the_same_tensor_share_its_moment(ranked: Ranked) -> None:
    keys = ranked.statistics.input_keys
    for first, *others in (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
    ):
        assert {keys[f"model.layers.0.{name}"] for name in others} == {keys[f"model.layers.0.{first}"]}
    assert len(set(keys.values())) == 2 * 4
    assert set(ranked.statistics.inputs) == {*keys.values(), "model.embed_tokens.weight"}


def test_gradient_moment_is_that_of_each_tokens_own_loss(ranked: Ranked) -> None:
    """For the last layer before the head the Fisher moment of the logits is known without sampling: diag(p) - p p^T."""
    name = "model.layers.1.mlp.down_proj"
    norm, head = ranked.model.get_submodule("model.norm"), ranked.model.get_submodule("lm_head")
    states: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _m, args: states.append(args[0].flatten(0, 1)))
    ranked.logits()
    handle.remove()
    rows = states[0]
    jacobians = torch.func.vmap(torch.func.jacrev(lambda h: head(norm(h))))(rows[::8]).double()
    p = torch.softmax(head(norm(rows[::8])), -1).double()
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = (jacobians.mT @ fisher @ jacobians).mean(0)
    measured = gradient_of(ranked.statistics, name)
    # 4,096 sampled labels: the trace's standard error is a few per cent; gradients of the batch's mean loss instead of
    # each token's own would be off by orders of magnitude.
    assert float(measured.trace()) == pytest.approx(float(expected.trace()), rel=0.15)


@pytest.mark.parametrize("basis", ["svd", "input", "kfac"])
def test_predicted_loss_of_dropped_components_is_measured(ranked: Ranked, basis: str) -> None:
    predicted, measured = [], []
    for name in ranked.checkpoint.linear_modules:
        h, g = input_of(ranked.statistics, name), gradient_of(ranked.statistics, name)
        weight = ranked.model.get_parameter(f"{name}.weight").data
        parts = components(weight, None if basis == "svd" else h, g if basis == "kfac" else None)
        losses = component_losses(parts, h, g).drop
        for start in range(0, len(losses), 30):
            chosen = torch.arange(start, min(start + 4, len(losses)))
            with ranked.changed(f"{name}.weight", -parts.up[:, chosen] @ parts.down[chosen]):
                measured.append(ranked.divergence())
            predicted.append(float(losses[chosen].sum()))
    small = np.array(measured) < 0.3  # beyond that a second-order estimate is no longer local
    ratio = np.log(np.array(measured)[small] / np.array(predicted)[small])
    assert small.sum() > 15
    # K-FAC neglects how inputs and gradients depend on each other, and tokens on each other.
    assert abs(np.median(ratio)) < np.log(2)
    assert np.corrcoef(np.log(np.array(measured)[small]), np.log(np.array(predicted)[small]))[0, 1] > 0.9


def test_drop_loss_is_half_the_squared_singular_value_in_the_kfac_basis(ranked: Ranked) -> None:
    name = "model.layers.0.self_attn.q_proj"
    h, g = input_of(ranked.statistics, name), gradient_of(ranked.statistics, name)
    parts = components(ranked.model.get_parameter(f"{name}.weight").data, h, g)
    # The basis is damped by 1e-4 of the mean eigenvalue, which matters to the smallest components only.
    torch.testing.assert_close(
        component_losses(parts, h, g).drop[:24], 0.5 * parts.singular.double()[:24] ** 2, rtol=0.02, atol=0
    )


def test_sensitivity_predicts_rounding_noise(ranked: Ranked) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        h, g = input_of(ranked.statistics, name), gradient_of(ranked.statistics, name)
        weight = ranked.model.get_parameter(f"{name}.weight").data
        parts = components(weight, h, g)
        losses = component_losses(parts, h, g)
        relative_mse = 1e-3
        noise = [
            torch.randn(s, generator=generator) * relative_mse**0.5
            for s in (weight.shape, parts.up.shape, parts.down.shape)
        ]
        cases = [
            (weight * noise[0], dense_sensitivity(weight, h.diagonal(), g.diagonal())),
            ((parts.up * noise[1]) @ parts.down, float(losses.up_sensitivity.sum())),
            (parts.up @ (parts.down * noise[2]), float(losses.down_sensitivity.sum())),
        ]
        for change, sensitivity in cases:
            with ranked.changed(f"{name}.weight", change):
                # One draw of the noise, and K-FAC's assumptions: see above.
                assert 0.5 < ranked.divergence() / (relative_mse * sensitivity) < 2


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_sensitivity_covers_both_uses(tmp_path: Path, text: Path, tied: bool) -> None:
    ranked = Ranked(sharp_model(tmp_path / "model", tie_word_embeddings=tied), text)
    sensitivity = ranked.statistics.embedding_sensitivity
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    assert sorted(sensitivity) == sorted(names)
    for name in names:
        weight = ranked.model.get_parameter(name)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-2
        with ranked.changed(name, weight.data * noise):
            assert 0.5 < ranked.divergence() / (1e-4 * sensitivity[name]) < 2


@pytest.mark.parametrize("tied", [True, False])
def test_moments_of_embedding_and_head_tell_directions_apart(tmp_path: Path, text: Path, tied: bool) -> None:
    ranked = Ranked(sharp_model(tmp_path / "model", tie_word_embeddings=tied), text)
    for name in ranked.statistics.embedding_sensitivity:
        values, vectors = torch.linalg.eigh(ranked.statistics.inputs[name])
        for place in (len(values) // 2, -1):
            noise = torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
            change = 1e-2 * values[-1] ** -0.5 * noise.double() @ vectors[None, :, place]
            with ranked.changed(name, change.float()):
                predicted = 0.5e-4 * float(values[place] / values[-1])
                assert 0.4 < ranked.divergence() / predicted < 2.5


def test_statistics_leave_no_hooks_and_no_gradients(ranked: Ranked) -> None:
    assert all(parameter.grad is None for parameter in ranked.model.parameters())
    assert not any(isinstance(m, nn.Linear) and m._forward_hooks for m in ranked.model.modules())


def test_moments_of_one_block_at_most_are_in_memory(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(sharp_model(tmp_path / "model", num_hidden_layers=6), text, windows=8)
    alive: set[int] = set()
    most = 0
    make = PackedMoment.root

    def counted(packed: PackedMoment, damping: float, name: str = "") -> tuple[Tensor, Tensor]:
        nonlocal most
        made = make(packed, damping, name)
        alive.add(id(made[0]))
        weakref.finalize(made[0], alive.discard, id(made[0]))
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(PackedMoment, "root", counted)
    factorize_model(context, collect_statistics(context), "kfac")
    # Four inputs and seven output gradients; two blocks where layers are factorized side by side.
    assert 0 < most <= 2 * 11 < 6 * 11


def test_what_a_block_does_not_read_of_the_one_before_is_refused(model: Path, text: Path) -> None:
    context = context_of(model, text, windows=2)
    last = context.model.get_submodule("model.layers.1")
    last.register_forward_pre_hook(lambda _m, args: (args[0] + 0.0, *args[1:]))
    with pytest.raises(UnsupportedError, match=r"layers\.1 does not read what model\.layers\.0 returns"):
        collect_statistics(context)


def test_fisher_of_the_masks_is_the_mean_square_of_their_gradients(model: Path, text: Path) -> None:
    context = context_of(model, text, windows=16, calibration=replace(CALIBRATION, batch=4, seed=5))
    parts = factorize_model(context, collect_statistics(context, samples=True), "kfac")
    name = "model.layers.0.mlp.up_proj"
    measured = component_fisher(context, parts)[name]
    layer = parts.layers[name]
    plain = torch.zeros(len(layer.mask))
    for first, part in zip(range(0, 16, 4), context.windows.split(4), strict=True):
        # Each batch draws from a generator of its own: see collect_statistics.
        generator = torch.Generator().manual_seed((5 << 32) + first)
        logits = context.model(input_ids=part).logits
        labels = draw(logits.detach().flatten(0, 1).softmax(-1), generator).view(4, 32)
        losses = F.cross_entropy(logits.mT, labels, reduction="none").sum(1)
        for loss in losses:
            (gradient,) = torch.autograd.grad(loss, layer.mask, retain_graph=True)
            plain += 0.5 * gradient**2 / context.windows.numel()
    # Samples are kept in bfloat16.
    torch.testing.assert_close(torch.from_numpy(measured).float(), plain, rtol=2e-2, atol=1e-3 * float(plain.mean()))


def test_gradients_of_few_tokens_are_drawn_towards_the_diagonal(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(model, text, windows=32)
    stored: dict[str, Tensor] = {}
    monkeypatch.setattr(StoredMoments, "store", lambda _self, moments: stored.update(moments))
    collect_statistics(context)
    drawn = dict(stored)
    monkeypatch.setattr(statistics, "_UNCORRELATED", 0)
    collect_statistics(context)
    inputs, gradients = (f"model.layers.1.mlp.down_proj.{side}" for side in ("input", "gradient"))
    plain = stored[gradients]
    # As much of what is off the diagonal is left as these 1,024 tokens have of them and 1,024 others.
    torch.testing.assert_close(drawn[gradients], plain / 2 + plain.diagonal().diag() / 2, rtol=1e-6, atol=0)
    assert torch.equal(drawn[inputs], stored[inputs])


def test_more_windows_for_inputs_than_for_gradients(model: Path, text: Path) -> None:
    context = context_of(model, text, windows=16)
    few = replace(context, data=replace(context.data, graded=8))
    both, fewer = collect_statistics(context), collect_statistics(few)
    alone = collect_statistics(replace(context, data=replace(context.data, statistics=context.windows[:8])))
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(input_of(fewer, name), input_of(both, name))
    assert torch.equal(gradient_of(fewer, name), gradient_of(alone, name))
    assert not torch.equal(input_of(fewer, name), input_of(alone, name))
    assert not torch.equal(gradient_of(fewer, name), gradient_of(both, name))
