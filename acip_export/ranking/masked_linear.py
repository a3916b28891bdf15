"""Write linear layers as masked sums of singular components with an adapter beside them (ACIP, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acip_export.artifacts.scores import AdapterScaling, adapter_share
from acip_export.lowrank.components import Components
from acip_export.ranking.masked_ops import Adapter, frozen_linear, masked_linear
from acip_export.ranking.sharding import local, part_of

# Components are multiplied in multiples of these, the last ones by zero: oneDNN compiles a kernel for every new shape
# and keeps it, which took a third of a step of 56 layers of 640, and 240 MB.
_PLACES = 32


@dataclass(frozen=True)
class AdapterShape:
    """Describe the low-rank adapter of every layer.

    Attributes:
        rank: 0 for no adapter. alpha, dropout: as in LoRA.
        scaling: see :func:`acip_export.artifacts.scores.adapter_share`.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: AdapterScaling = "constant"

    def rank_for(self, out: int, inputs: int) -> int:
        """Cap the rank at a quarter of the smaller side: beyond that an adapter is no longer low-rank."""
        return min(self.rank, min(out, inputs) // 4)


NO_ADAPTER = AdapterShape(0)


class MaskedLinear(nn.Module):
    """Compute ``y = sum_k m_k up_k (down_k x) + B A dropout(x) + bias``, in place of a linear layer.

    ``mask`` holds m scaled (``mask_scale``), and acts through a straight-through estimator: 1 where it is positive, 0
    elsewhere; its gradient passes through a ReLU, so that a pruned component stays pruned.

    The components are stored in any order, the ``live`` first ones take part. Pruned components are moved to the back,
    so they cost neither time nor a second copy of the factors.

    Attributes:
        up: (out, k), down: (k, in): frozen, in the dense weight's dtype. arrangement: (k,) component at each place.
        mask: (k,) by component. adapter_a: (a, in), adapter_b: (out, a). These are float32, or float64 if the model is.
        live: leading places in use. gated: multiply by the mask. adapted: add the adapter.
        probe: (windows, 1, k) multiplied into the components, for gradients by window.
    """

    arrangement: Tensor

    def __init__(self, basis: Components, dense: nn.Linear, mask_scale: float, adapter: AdapterShape) -> None:
        super().__init__()
        dtype, device = dense.weight.dtype, dense.weight.device
        trained = torch.promote_types(dtype, torch.float32)
        self.out_features, self.in_features = dense.weight.shape
        components = len(basis.singular)
        self.up = nn.Parameter(basis.up.to(device, dtype), requires_grad=False)
        self.down = nn.Parameter(basis.down.to(device, dtype), requires_grad=False)
        self.register_buffer("arrangement", torch.arange(components, device=device))
        self.bias = dense.bias
        self.mask_scale = mask_scale
        self.mask = nn.Parameter(torch.full((components,), mask_scale, dtype=trained, device=device))
        rank = adapter.rank_for(self.out_features, self.in_features)
        self.adapter_a = nn.Parameter(torch.empty(rank, self.in_features, dtype=trained, device=device))
        self.adapter_b = nn.Parameter(torch.zeros(self.out_features, rank, dtype=trained, device=device))
        if rank:
            nn.init.kaiming_uniform_(self.adapter_a, a=math.sqrt(5))  # LoRA's
        self.adapter_scale = adapter.alpha / rank if rank else 0.0
        self.dropout, self.adapter_scaling = adapter.dropout, adapter.scaling
        self.live, self.gated, self.adapted = components, True, rank > 0
        self._held: tuple[Tensor, Tensor] | None = None
        self.probe: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Stand in for the dense weight where a model looks at its dtype or device."""
        return self.down

    def gate(self) -> Tensor:
        """Make ones and zeros (k,), with the gradient of the stored mask through ReLU and scale."""
        positive = F.relu(self.mask)
        return (positive > 0).to(positive.dtype) + (positive - positive.detach()) / self.mask_scale

    def arrange(self, order: Tensor, live: int) -> None:
        """Put the components into ``order`` (k,) and use the ``live`` first ones."""
        place = torch.empty_like(self.arrangement)
        place[self.arrangement] = torch.arange(len(place), device=place.device)
        moves = place[order]
        # Rows of ``up`` and columns of ``down`` are what may be sharded: every part moves by itself.
        for factor, dim in ((self.up, 1), (self.down, 0)):
            local(factor).copy_(local(factor).index_select(dim, moves))
        self.arrangement = order.clone()
        self.live = live

    @torch.no_grad()
    def hold(self, up: Tensor, down: Tensor) -> None:
        """Have ``up`` (out, live) and ``down`` (live, in) in the first places until :meth:`release`."""
        ours = local(self.up)[:, : self.live], local(self.down)[: self.live]
        self._held = ours[0].to("cpu", copy=True), ours[1].to("cpu", copy=True)
        ours[0].copy_(part_of(up, self.up))
        ours[1].copy_(part_of(down, self.down))

    @torch.no_grad()
    def release(self) -> None:
        """Put the components back."""
        if self._held is not None:
            up, down = self._held
            local(self.up)[:, : up.shape[1]].copy_(up)
            local(self.down)[: down.shape[0]].copy_(down)
            self._held = None

    def adapter_share(self) -> float:
        """Return the share of the adapter that takes part at this size; while masks move, all of it."""
        return 1.0 if self.gated else adapter_share(self.adapter_scaling, self.live, len(self.mask))

    def drop_pruned(self) -> None:
        """Move components whose mask is zero to the back."""
        alive = self.mask.detach() > 0
        count = int(alive.sum())
        if count < self.live:
            self.arrange(torch.cat([alive.nonzero().flatten(), (~alive).nonzero().flatten()]), count)

    def forward(self, x: Tensor) -> Tensor:
        if self.probe is not None:
            down, up = self.down[: self.live], self.up[:, : self.live]
            return frozen_linear(frozen_linear(x, down) * self.probe.to(x.dtype), up, self.bias)
        places = min(-(-self.live // _PLACES) * _PLACES, len(self.mask))
        down, up = self.down[:places], self.up[:, :places]
        gate = None
        if self.gated:
            gate = self.gate()[self.arrangement[:places]]
        elif places > self.live:
            gate = (torch.arange(places, device=x.device) < self.live).to(self.mask.dtype)
        adapter = None
        if self.adapted:
            keep = 1 - self.dropout if self.training else 1.0
            adapter = Adapter(self.adapter_a, self.adapter_b, self.adapter_scale * self.adapter_share(), keep)
        y = masked_linear(x, down, up, gate, adapter)
        return y if self.bias is None else y + self.bias


@contextmanager
def dense_behaviour(layers: Mapping[str, MaskedLinear]) -> Iterator[None]:
    """Let the layers act inside as the dense ones did: all components, no masks, no adapters."""
    before = {name: (layer.live, layer.gated, layer.adapted) for name, layer in layers.items()}
    for layer in layers.values():
        layer.live, layer.gated, layer.adapted = len(layer.mask), False, False
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.live, layer.gated, layer.adapted = before[name]


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` where the linear layer ``name`` was, which is not kept."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def live_ratio(layers: Mapping[str, MaskedLinear]) -> float:
    """Return the share of the linear layers' parameters that is left.

    A layer whose pair would be larger counts as dense.
    """
    present = total = 0
    for layer in layers.values():
        size = layer.in_features * layer.out_features
        alive = int((layer.mask.detach() > 0).sum())
        present += min(alive * (layer.in_features + layer.out_features), size)
        total += size
    return present / total
