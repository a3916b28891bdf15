"""Descend with the factor pairs of a plan, those of one block in memory at a time.

A pair and the two means that Adam keeps of its gradients (Kingma & Ba, arXiv 1412.6980) lie in a file. A pass reads the
pairs of a block, and once their gradients are there they are moved and written back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt

import torch
from torch import Tensor

from acip_export.io.scratch import Scratch
from acip_export.materialization.factors import Pair

_MEANS = (0.9, 0.98)
_TINY = 1e-12


class PairDescent:
    """The pairs of a plan, by the name of the weight that each stands for.

    Args:
        scratch: where they lie.

    Attributes:
        waiting: factors that a pass has read, and that :meth:`step` will move.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        # The root mean square that both factors of a pair began with: what a step is a share of.
        self._sizes: dict[str, float] = {}
        self.waiting: dict[str, tuple[Tensor, Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def add(self, name: str, pair: Pair) -> None:
        """Take a pair to begin with; its factors get the same root mean square, which float16 can hold."""
        up, down = _size(pair.up), _size(pair.down)
        share = sqrt(down / up) if up and down else 1.0  # of a matrix of zeros both are zero
        for key, factor in zip(_keys(name), (pair.up * share, pair.down / share), strict=True):
            self._scratch.write(key, factor.contiguous().numpy())
            self._scratch.write(_start_key(key), factor.contiguous().numpy())
            for mean in _mean_keys(key):
                self._scratch.write(mean, torch.zeros_like(factor).numpy())
        self._sizes[name] = up * share

    def product(self, name: str) -> Tensor:
        """Return the weight that a pair stands for, (out, in).

        Where gradients are recorded, :meth:`step` moves the pair by them.
        """
        up, down = (torch.from_numpy(self._scratch.read(key)) for key in _keys(name))
        if torch.is_grad_enabled():
            self.waiting[name] = up.requires_grad_(), down.requires_grad_()
        return up @ down

    def step(self, number: int, rate: float) -> None:
        """Move all pairs that have gradients.

        Args:
            number: of the step, from 1. rate: as a share of each factor's root mean square.
        """
        for name, factors in self.waiting.items():
            for key, factor in zip(_keys(name), factors, strict=True):
                if factor.grad is not None:
                    self._move(key, factor.detach(), factor.grad, number, rate * self._sizes[name])
        self.waiting = {}

    def pair(self, name: str) -> Pair:
        """Return a pair as it is now."""
        return Pair(*(torch.from_numpy(self._scratch.read(key)) for key in _keys(name)))

    def start(self, name: str) -> Pair:
        """Return a pair as it came, but for the size of its factors."""
        return Pair(*(torch.from_numpy(self._scratch.read(_start_key(key))) for key in _keys(name)))

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the weights."""
        yield from self._sizes

    def state(self) -> dict[str, Tensor]:
        """Return all numbers that a run goes on from, as they are in the file: they may be too many for memory."""
        keys = [key for name in self._sizes for factor in _keys(name) for key in (factor, *_mean_keys(factor))]
        arrays = self._scratch.mapped(keys) if keys else {}
        sizes = {_size_key(name): torch.tensor(size, dtype=torch.float64) for name, size in self._sizes.items()}
        return sizes | {key: torch.from_numpy(array) for key, array in arrays.items()}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state`; other numbers may be there too."""
        for name in self._sizes:
            self._sizes[name] = float(stored[_size_key(name)])
            for factor in _keys(name):
                for key in (factor, *_mean_keys(factor)):
                    self._scratch.write(key, stored[key].numpy())

    def _move(self, key: str, factor: Tensor, gradient: Tensor, number: int, rate: float) -> None:
        first, second = (torch.from_numpy(self._scratch.read(mean)) for mean in _mean_keys(key))
        first.lerp_(gradient, 1 - _MEANS[0])
        second.mul_(_MEANS[1]).addcmul_(gradient, gradient, value=1 - _MEANS[1])
        unbiased = [1 - mean**number for mean in _MEANS]
        factor.addcdiv_(first, second.sqrt().div_(sqrt(unbiased[1])).add_(_TINY), value=-rate / unbiased[0])
        for name, tensor in zip((key, *_mean_keys(key)), (factor, first, second), strict=True):
            self._scratch.write(name, tensor.numpy())


def _size(factor: Tensor) -> float:
    return float(factor.square().mean().sqrt())


def _keys(name: str) -> tuple[str, str]:
    """Return where the factors of a pair lie."""
    return f"up of {name}", f"down of {name}"


def _start_key(key: str) -> str:
    return f"start of {key}"


def _size_key(name: str) -> str:
    return f"size of {name}"


def _mean_keys(key: str) -> tuple[str, str]:
    """Return where the means of the gradients of a factor lie."""
    return f"mean of {key}", f"square of {key}"
