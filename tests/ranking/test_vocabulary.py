"""Logits in slices: the same losses and gradients as with all of them, and labels from the right distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from acip_export.ranking import vocabulary
from acip_export.ranking.losses import before_head, measured_next_tokens, next_token_loss, token_cross_entropy
from acip_export.ranking.tasks import CAUSAL, Task
from tests.ranking.support import context_of


@pytest.mark.parametrize("width", [5, 256, 1000])
def test_labels_are_drawn_as_often_as_they_are_probable(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.rand(width, generator=generator) ** 4
    row[[0, 3]] = 0
    row[4:8:2] = row.sum() / 4  # some that are drawn often
    row /= row.sum()
    counts = torch.bincount(vocabulary.draw(row.expand(20_000, -1), generator), minlength=width).double()
    assert counts[row == 0].sum() == 0
    often = row > 5e-4
    deviations = (counts - 20_000 * row)[often] / (20_000 * row * (1 - row))[often].sqrt()
    assert float(deviations.abs().max()) < 4.5 and float(deviations.square().mean().sqrt()) < 1.5


def test_certain_labels_are_drawn_whatever_the_number() -> None:
    rows = torch.eye(700)
    torch.testing.assert_close(vocabulary.draw(rows, torch.Generator().manual_seed(0)), torch.arange(700))


@pytest.fixture
def slices_of_some_tokens(monkeypatch: pytest.MonkeyPatch) -> list[slice]:
    """Slices of 7 tokens, in which 64 do not go."""
    made: list[slice] = []

    def cut(tokens: int, _vocabulary: int):  # type: ignore[no-untyped-def]
        for begin in range(0, tokens, 7):
            made.append(slice(begin, min(begin + 7, tokens)))
            yield made[-1]

    for module in ("losses", "tasks"):
        monkeypatch.setattr(f"acip_export.ranking.{module}.token_slices", cut)
    return made


def test_next_token_loss_in_slices(model: Path, text: Path, slices_of_some_tokens: list[slice]) -> None:
    context = context_of(model, text, windows=2)
    embedding = context.model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda _m, _a, output: output.detach().requires_grad_())
    leaves: list[torch.Tensor] = []
    watch = embedding.register_forward_hook(lambda _m, _a, output: leaves.append(output))
    loss = next_token_loss(context.model, context.windows)
    (2 * loss).backward()
    assert len(slices_of_some_tokens) == 10
    logits = context.model(input_ids=context.windows, use_cache=False).logits
    plain = token_cross_entropy(logits[:, :-1].flatten(0, 1), context.windows[:, 1:].flatten())
    (2 * plain).backward()
    for hook in (handle, watch):
        hook.remove()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(context.model, context.windows), plain.detach())


class _WholeLogits(torch.nn.Module):
    """A model that makes the logits of all tokens at once, and says nothing of its head."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        return self.model(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize("whole", [False, True], ids=["sliced", "whole"])
def test_measured_loss_and_divergence_in_slices(
    whole: bool, model: Path, text: Path, slices_of_some_tokens: list[slice]
) -> None:
    context = context_of(model, text, windows=2)
    measured = _WholeLogits(context.model) if whole else context.model
    assert vocabulary.can_slice(measured) != whole
    head = context.model.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        rows = before_head(measured, context.windows)
        dense = rows + 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        logits, others = (each if whole else head(each) for each in (rows, dense))
        loss, divergence = measured_next_tokens(measured, context.windows, rows, dense)
        ours, theirs = (each.double().log_softmax(-1) for each in (logits, others))
        assert len(slices_of_some_tokens) == 10
        assert loss == pytest.approx(float(next_token_loss(measured, context.windows)), rel=1e-5)
    assert divergence == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)
    assert divergence > 1e-4


def test_sampled_loss_in_slices(model: Path, text: Path, slices_of_some_tokens: list[slice]) -> None:
    context = context_of(model, text, windows=2)
    embedding = context.model.get_input_embeddings()  # type: ignore[operator]
    leaves: list[torch.Tensor] = []

    def start(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = embedding.register_forward_hook(start)
    losses = []
    for backward in (CAUSAL.backward_sampled, lambda *arguments: Task.backward_sampled(CAUSAL, *arguments)):
        # One random number a token: how many tokens a slice has makes no difference.
        losses.append(backward(context.model, context.windows, torch.Generator().manual_seed(3)))
    handle.remove()
    assert slices_of_some_tokens
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, two = (leaf.grad for leaf in leaves)
    assert one is not None and two is not None
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))  # float32 sums


def test_no_logits_on_the_way_to_the_head(model: Path, text: Path) -> None:
    """Those of a few tokens are made from a float32 copy of a head that is stored in bfloat16."""
    context = context_of(model, text, windows=2)
    head, made = context.model.get_output_embeddings(), []  # type: ignore[operator]
    handle = head.register_forward_hook(lambda _m, _a, output: made.append(output.numel()))
    hidden = vocabulary.final_hidden(context.model, context.windows)
    handle.remove()
    assert hidden.shape[:2] == context.windows.shape and made == [0]
