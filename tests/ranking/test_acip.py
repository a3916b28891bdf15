"""The learned ranking, against the paper's equations and for what it must guarantee."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acip_export.errors import RankingError
from acip_export.model.checkpoint import Checkpoint
from acip_export.ranking import AcipConfig
from acip_export.ranking.acip_run import AcipRun, advance
from acip_export.ranking.factorized_model import factorize_model
from acip_export.ranking.load import load_model
from acip_export.ranking.masked_linear import AdapterShape
from acip_export.ranking.statistics import Statistics, collect_statistics
from tests.ranking.plain_acip import PlainAcip
from tests.ranking.support import context_of

CPU = torch.device("cpu")
# Faster than the paper's by as much as the tests are shorter.
QUICK = AcipConfig(
    learning_rate=2e-3, penalty=3e-3, penalty_growth=1.2, post_tune=4, adapter_dropout=0.0, batch=2, adapter_rank=4
)


@pytest.fixture(scope="module")
def statistics(model: Path, text: Path) -> Statistics:
    return collect_statistics(context_of(model, text, windows=32))


def start(
    model: Path,
    text: Path,
    statistics: Statistics,
    config: AcipConfig,
    prepared: Callable[[nn.Module], nn.Module] = lambda dense: dense,
) -> AcipRun:
    context = context_of(model, text)
    torch.manual_seed(0)
    context = replace(context, model=prepared(context.model))
    adapter = AdapterShape(config.adapter_rank, config.adapter_alpha, config.adapter_dropout)
    parts = factorize_model(context, statistics, config.basis, config.mask_scale, adapter)
    return AcipRun(context, parts.layers, parts.drop_losses, config)


class _DoubleNorm(nn.Module):
    """transformers' norms round to float32, whatever comes in."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def in_float64(dense: nn.Module) -> nn.Module:
    dense.double()
    for name, module in list(dense.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            dense.set_submodule(name, _DoubleNorm(module.weight.detach(), module.variance_epsilon))
    return dense


@pytest.mark.parametrize("learning_rate", [5e-5, 2e-3])
def test_masks_and_scores_are_those_of_the_papers_equations(
    model: Path, text: Path, statistics: Statistics, learning_rate: float
) -> None:
    """The paper's settings for as long as a test may take (nothing is pruned yet), then faster ones that prune.

    In float64, so that only the equations decide: in float32, Adam makes steps out of the rounding of tiny gradients.
    """
    config = AcipConfig(learning_rate=learning_rate, adapter_dropout=0.0, batch=2)
    run = start(model, text, statistics, config, in_float64)
    dense = in_float64(load_model(Checkpoint.open(model), CPU))
    adapters = {name: layer.adapter_a.detach() for name, layer in run.layers.items()}
    plain = PlainAcip(dense, list(run.layers), adapters, 0.02, 16.0, learning_rate)
    # Adam divides a gradient by its own size plus 1e-8: an error of 1e-15 in a gradient becomes at most 1e-7 of a step.
    close = 1e-7 * learning_rate * 20
    for _ in range(20):
        windows = run.stream.windows[torch.randperm(len(run.stream.windows), generator=_order(run))[_place(run)]]
        task = plain.step(windows)
        # The two add up the same products in another order: some hundred roundings of 1e-16 each.
        assert run.mask_step() == pytest.approx(task, rel=1e-12)
        for name, layer in run.layers.items():
            torch.testing.assert_close(layer.mask.detach(), plain.p[name], rtol=0, atol=close)
            ours, theirs = run.score_map[name], plain.score_map[name].numpy()
            np.testing.assert_array_equal(np.minimum(ours, 0), np.minimum(theirs, 0))
            # Those alive score their masks, which a score map keeps in float32.
            np.testing.assert_allclose(np.maximum(ours, 0), np.maximum(theirs, 0), rtol=2**-22, atol=close)
    assert run.penalty == pytest.approx(plain.weight)
    pruned = sum(int((scores <= 0).sum()) for scores in run.score_map.values())
    assert (pruned > 50) if learning_rate > 1e-3 else (pruned == 0)


def _order(run: AcipRun) -> torch.Generator:
    return torch.Generator().manual_seed(run.stream.position // (len(run.stream.windows) // 2))


def _place(run: AcipRun) -> slice:
    place = run.stream.position % (len(run.stream.windows) // 2)
    return slice(2 * place, 2 * place + 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"basis": "kfac", "start": "drop-loss", "post_tune_sizes": "sampled"},
        {"basis": "input", "objective": "distill"},
        {"adapter_rank": 0},
        {"adapter_rank": 0, "basis": "kfac", "objective": "distill", "start": "drop-loss", "second_order": True},
    ],
    ids=["paper", "kfac-order", "distill", "no-adapters", "second-order"],
)
def test_run_ends_at_the_stop_ratio_with_a_total_order(
    model: Path, text: Path, statistics: Statistics, changes: dict[str, object]
) -> None:
    run = start(model, text, statistics, replace(QUICK, **changes))
    seen = []
    for _ in advance(run, 32, seen.append):
        pass
    assert run.ratio() <= 0.4
    scores = np.concatenate([run.scores()[name] for name in run.layers])
    alive = np.concatenate([layer.mask.detach().numpy() > 0 for layer in run.layers.values()])
    assert scores[alive].min() > 0 > scores[~alive].max()
    assert len(np.unique(scores[~alive])) == (~alive).sum()
    ratios = [report.ratio for report in seen if report.stage == "masks"]
    assert ratios == sorted(ratios, reverse=True)
    assert run.tune_steps == (0 if changes.get("adapter_rank") == 0 else QUICK.post_tune)


def test_to_second_order_a_loss_pushes_out_only_what_it_is_better_without(
    model: Path, text: Path, statistics: Statistics
) -> None:
    run = start(model, text, statistics, replace(QUICK, basis="kfac", second_order=True))
    for layer, predicted in zip(run.layers.values(), run._mask_losses, strict=True):
        loss = torch.linspace(-2, 2, len(layer.mask))
        layer.mask.grad = loss * predicted
    run._penalize()
    for layer, predicted in zip(run.layers.values(), run._mask_losses, strict=True):
        loss = torch.linspace(-2, 2, len(layer.mask))
        # Up as before; down only by what exceeds the predicted loss of going all the way.
        expected = torch.where(loss < 0, loss, (loss - 1).clamp_min(0)) * predicted + QUICK.penalty
        torch.testing.assert_close(layer.mask.grad, expected)
    name, layer = next(iter(run.layers.items()))
    # The unit of the masks' gradients: a mask of one is stored as its scale.
    np.testing.assert_allclose(run._mask_losses[0] * layer.mask_scale, run.drop_losses[name], rtol=1e-6)


def test_post_tuning_moves_adapters_only(model: Path, text: Path, statistics: Statistics) -> None:
    run = start(model, text, statistics, QUICK)
    while not run.masks_done:
        run.mask_step()
    masks = [mask.detach().clone() for mask in run.masks]
    adapters = [adapter.detach().clone() for adapter in run.adapters]
    for _ in range(3):
        run.tune_step()
    assert all(torch.equal(a, b) for a, b in zip(masks, run.masks, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(adapters, run.adapters, strict=True))


def test_graded_start_prunes_in_the_order_of_predicted_loss(model: Path, text: Path, statistics: Statistics) -> None:
    """With a penalty that outweighs the loss nothing is corrected: what is left is the training-free order."""
    run = start(model, text, statistics, replace(QUICK, basis="kfac", start="drop-loss", penalty=1e4))
    while not run.masks_done:
        run.mask_step()
    scores = np.concatenate(list(run.scores().values()))
    losses = np.concatenate([run.drop_losses[name] for name in run.layers])
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(losses, kind="stable"))


def test_distillation_of_the_dense_model_from_itself_is_free(model: Path, text: Path, statistics: Statistics) -> None:
    run = start(model, text, statistics, replace(QUICK, objective="distill"))
    assert run.mask_step() == pytest.approx(0, abs=1e-5)  # adapters are zero and all masks one before the first step


def test_diverging_run_says_so(model: Path, text: Path, statistics: Statistics) -> None:
    run = start(model, text, statistics, QUICK)
    next(iter(run.layers.values())).adapter_b.data.fill_(float("inf"))
    with pytest.raises(RankingError, match=r"loss is nan.*\n.*learning rate"):
        run.mask_step()
