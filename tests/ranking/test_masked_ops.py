"""Hand-written gradients against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from acip_export.ranking.losses import token_cross_entropy, token_divergence
from acip_export.ranking.masked_ops import Adapter, frozen_linear, masked_linear


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_masked_product(gated: bool, adapted: bool) -> None:
    x, gate, a, b, target = leaves((2, 7, 12), (9,), (3, 12), (20, 3), (2, 7, 20))
    down, up = (t.detach() for t in leaves((9, 12), (20, 9)))
    gate.data = torch.ones(9)  # what it is wherever a gradient goes through
    wanted = [x, *([gate] if gated else []), *([a, b] if adapted else [])]
    y = masked_linear(x, down, up, gate if gated else None, Adapter(a, b, 0.7, 1.0) if adapted else None)
    plain = F.linear(F.linear(x, down) * (gate if gated else 1), up)
    plain = plain + (0.7 * F.linear(F.linear(x, a), b) if adapted else 0)
    torch.testing.assert_close(y, plain)
    for ours, theirs in zip(
        torch.autograd.grad(y, wanted, target), torch.autograd.grad(plain, wanted, target), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_dropout_drops_the_same_inputs_in_both_directions() -> None:
    x, a, b, target = leaves((64, 12), (3, 12), (20, 3), (64, 20))
    down, up = torch.zeros(0, 12), torch.zeros(20, 0)
    y = masked_linear(x, down, up, None, Adapter(a, b, 1.0, 0.6))
    at_x, at_a = torch.autograd.grad(y, (x, a), target)
    dropped = at_x == 0
    assert 0.3 < dropped.float().mean() < 0.5  # 768 draws of 0.4, deviating by 0.02
    kept = torch.where(dropped, 0, x / 0.6)
    torch.testing.assert_close(y, kept @ a.T @ b.T)
    torch.testing.assert_close(at_a, (target @ b).T @ kept)


def test_frozen_factors_of_a_narrow_dtype_are_not_widened_for_the_backward_pass() -> None:
    x, target = leaves((5, 12), (5, 20))
    weight = torch.randn(20, 12).bfloat16()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen_linear(x, weight)
    (at_x,) = torch.autograd.grad(y, x, target)
    torch.testing.assert_close(y, x @ weight.float().T)
    torch.testing.assert_close(at_x, target @ weight.float())
    assert [t.dtype for t in saved] == [torch.bfloat16]


def test_losses_are_the_librarys() -> None:
    # More tokens than one chunk, and not a multiple of it.
    logits, dense = leaves((300, 40), (300, 40))
    labels = torch.randint(40, (300,), generator=torch.Generator().manual_seed(0))
    pairs = [
        (token_cross_entropy(logits, labels), F.cross_entropy(logits, labels)),
        (
            token_divergence(logits, dense.detach().clone()),
            F.kl_div(logits.log_softmax(-1), dense.detach().log_softmax(-1), reduction="batchmean", log_target=True),
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        gradients = (torch.autograd.grad(3 * loss, logits)[0] for loss in (ours, theirs))
        torch.testing.assert_close(*gradients)
