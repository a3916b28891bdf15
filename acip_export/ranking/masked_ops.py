"""Compute the products of a masked layer, with exactly what their gradients need kept for the backward pass.

Frozen factors may be stored in a narrower dtype than the activations: they are widened for each product, and again in
the backward pass, instead of keeping a wide copy of every layer until then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class Adapter:
    """Hold an adapter, which adds ``scale * b (a dropout(x))``.

    Attributes:
        a, b: (r, in) and (out, r), trained, in float32 or wider. keep: share of inputs that dropout leaves.
    """

    a: Tensor
    b: Tensor
    scale: float
    keep: float


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x weight^T + bias`` with a frozen weight (out, in) of any dtype; the result has the dtype of ``x``."""
    y: Tensor = _FrozenLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


def masked_linear(x: Tensor, down: Tensor, up: Tensor, gate: Tensor | None, adapter: Adapter | None) -> Tensor:
    """Compute ``up (gate * down x)`` plus the adapter.

    Args:
        x: (…, in). down: (k, in), up: (out, k): frozen. gate: (k,), or ``None`` for ones.
    """
    a, b = (None, None) if adapter is None else (adapter.a, adapter.b)
    scale, keep = (0.0, 1.0) if adapter is None else (adapter.scale, adapter.keep)
    y: Tensor = _MaskedLinear.apply(x, down, up, gate, a, b, scale, keep)  # type: ignore[no-untyped-call]
    return y


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        gate: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        keep: float,
    ) -> Tensor:
        rows = x.flatten(0, -2)
        hidden = rows @ down.to(x.dtype).T
        if gate is not None:
            hidden *= gate.to(x.dtype)
        y = hidden @ up.to(x.dtype).T
        kept = low = None
        if a is not None and b is not None:
            if keep < 1:
                kept = torch.empty(rows.shape, dtype=torch.bool, device=x.device).bernoulli_(keep)
            scale /= keep  # instead of dividing every input that dropout keeps
            low = _dropped(rows, kept) @ a.to(x.dtype).T
            y.addmm_(low, b.to(x.dtype).T, alpha=scale)
        # The hidden values are kept for the gate's gradient alone, the inputs for the adapter's.
        wants_gate, wants_adapter = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        ctx.scale, ctx.shape = scale, x.shape
        ctx.save_for_backward(
            rows if wants_adapter else None,
            hidden if wants_gate else None,
            down,
            up,
            gate,
            a,
            b,
            kept,
            low if wants_adapter else None,
        )
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, down, up, gate, a, b, kept, low = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        inner = gradient @ up.to(gradient.dtype)
        if gate is not None:
            inner *= gate.to(gradient.dtype)
        at_x = inner @ down.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        at_gate = at_a = at_b = None
        if hidden is not None:
            # ``hidden`` and ``inner`` were gated already. That is right where the gate is one, and where it is zero the
            # mask's ReLU stops the gradient anyway.
            at_gate = (inner.mul_(hidden)).to(gate.dtype).sum(0)
        if a is not None:
            inner_low = ctx.scale * (gradient @ b.to(gradient.dtype))
            if rows is not None:
                at_a = (inner_low.T @ _dropped(rows, kept)).to(a.dtype)
                at_b = (ctx.scale * (gradient.T @ low)).to(b.dtype)
            if at_x is not None:
                at_x += _dropped(inner_low @ a.to(gradient.dtype), kept)
        shaped = None if at_x is None else at_x.view(ctx.shape)
        return shaped, None, None, at_gate, at_a, at_b, None, None


def _dropped(rows: Tensor, kept: Tensor | None) -> Tensor:
    # Several times faster than a product with a bool tensor.
    return rows if kept is None else torch.where(kept, rows, rows.new_zeros(()))
