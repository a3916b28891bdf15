"""Masked layers: the dense layer at first, and exactly what their masks say afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acip_export.lowrank.components import components
from acip_export.ranking.masked_linear import AdapterShape, MaskedLinear, dense_behaviour, live_ratio

SCALE = 0.02


@pytest.fixture
def dense() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 20).requires_grad_(False)


def masked(dense: nn.Linear, rank: int = 3) -> MaskedLinear:
    layer = MaskedLinear(components(dense.weight, None, None), dense, SCALE, AdapterShape(rank, alpha=6))
    nn.init.normal_(layer.adapter_b)
    return layer


def test_is_the_dense_layer_while_nothing_is_pruned(dense: nn.Linear) -> None:
    layer = masked(dense, rank=0)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), dense(x))


def test_an_adapter_takes_part_by_the_share_that_is_dropped(dense: nn.Linear) -> None:
    adapter = AdapterShape(3, alpha=6, scaling="dropped")
    layer = MaskedLinear(components(dense.weight, None, None), dense, SCALE, adapter)
    nn.init.normal_(layer.adapter_b)
    x, whole = torch.randn(5, 12), 6 / 3 * layer.adapter_b @ layer.adapter_a
    torch.testing.assert_close(layer(x), dense(x) + x @ whole.T)  # masks that move have no size yet
    layer.gated = False
    for live, share in ((12, 0), (9, 0.5), (6, 1), (3, 1.5)):
        layer.live = live
        expected = x @ (layer.up[:, :live] @ layer.down[:live] + share * whole).T + dense.bias
        torch.testing.assert_close(layer(x), expected)


def test_masks_select_components_and_pass_gradients_straight_through(dense: nn.Linear) -> None:
    layer = masked(dense)
    layer.mask.data[[2, 5]] = torch.tensor([-0.001, 0.0])
    x, target = torch.randn(5, 12), torch.randn(5, 20)
    y = layer(x)
    kept = torch.ones(12).index_fill(0, torch.tensor([2, 5]), 0)
    expected = x @ ((layer.up * kept) @ layer.down + 6 / 3 * layer.adapter_b @ layer.adapter_a).T + dense.bias
    torch.testing.assert_close(y, expected)
    (y * target).sum().backward()
    # d/dm of sum target * (up m down x), over the scale; nothing for pruned ones.
    straight = ((x @ layer.down.T) * (target @ layer.up)).sum(0) / SCALE
    torch.testing.assert_close(layer.mask.grad, straight * kept)


def test_arranging_changes_places_but_not_the_function(dense: nn.Linear) -> None:
    layer = masked(dense)
    layer.mask.data[[0, 3, 11]] = -1
    x = torch.randn(5, 12)
    before = layer(x).detach()
    layer.drop_pruned()
    assert layer.live == 9
    torch.testing.assert_close(layer(x), before)
    layer(x).sum().backward()
    assert layer.mask.grad is not None and not layer.mask.grad[[0, 3, 11]].any()
    layer.mask.data[7] = -1
    before = layer(x).detach()
    layer.drop_pruned()
    torch.testing.assert_close(layer(x), before)
    layer.arrange(torch.arange(12), 12)
    torch.testing.assert_close(layer.up @ layer.down, dense.weight)


def test_dense_behaviour_is_the_dense_layer_and_ends(dense: nn.Linear) -> None:
    layer = masked(dense)
    layer.mask.data[:6] = -1
    layer.drop_pruned()
    x = torch.randn(5, 12)
    before = layer(x)
    with dense_behaviour({"layer": layer}):
        torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x), before)


def test_ratio_counts_a_pair_that_would_be_larger_as_dense(dense: nn.Linear) -> None:
    layer = masked(dense)
    layer.mask.data[:4] = -1
    assert live_ratio({"layer": layer}) == 1.0  # 8 * 32 > 12 * 20
    layer.mask.data[:9] = -1
    assert live_ratio({"layer": layer}) == 3 * 32 / 240


@pytest.mark.parametrize(("out", "inputs", "rank"), [(256, 256, 32), (64, 256, 16), (8, 8, 2)])
def test_adapters_are_capped_for_small_layers(out: int, inputs: int, rank: int) -> None:
    assert AdapterShape(32).rank_for(out, inputs) == rank
