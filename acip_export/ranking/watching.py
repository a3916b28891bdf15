"""Watch what passes the parts of a model: sums of outer products, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acip_export.ranking.processes import Processes
from acip_export.ranking.sharding import whole
from acip_export.ranking.stored_moments import Samples, StoredMoments
from acip_export.ranking.stored_tensors import StoredTensors

# Rows of a triangle, and of a head, that are worked on at a time.
_STRIP = 256


class Moments:
    """Sum the outer products of one block's rows, in float32: the upper triangle, in strips.

    A sum of n batches is off by n/2 float32 units at most; the score file keeps one.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, key: str, rows: Tensor) -> None:
        rows = rows.detach().flatten(0, -2).float()
        width = rows.shape[1]
        if key not in self.sums:
            self.sums[key] = rows.new_zeros(width, width)
        for begin in range(0, width, _STRIP):
            end = min(begin + _STRIP, width)
            self.sums[key][begin:end, begin:].addmm_(rows[:, begin:end].T, rows[:, begin:])

    def put(self, moments: StoredMoments, count: int, processes: Processes, shrink: float = 0.0) -> None:
        """Put the means into ``moments``, over all processes, and forget the sums.

        Args:
            shrink: share of what is off the diagonal that is taken away.
        """
        means = {}
        for key in list(self.sums):
            means[key] = mean = self.mean(key, count, processes)
            diagonal = mean.diagonal().clone()
            mean.mul_(1 - shrink).diagonal().copy_(diagonal)
        moments.store(means)

    def mean(self, key: str, count: int, processes: Processes) -> Tensor:
        """Return a mean over all processes, its upper triangle, and forget the sum."""
        return processes.sum(self.sums.pop(key)) / count

    def store(self, prefix: str, states: StoredTensors) -> None:
        """Keep the sums as they are now."""
        for key, total in self.sums.items():
            states[f"{prefix}/{key}"] = total

    def restore(self, prefix: str, states: StoredTensors, device: torch.device) -> None:
        """Undo :meth:`store`."""
        begin = f"{prefix}/"
        self.sums = {name.removeprefix(begin): states[name].to(device) for name in states if name.startswith(begin)}


class EmbeddingMoments:
    """Measure what rounding the embedding costs, from the gradients that come back to its rows.

    Attributes:
        total: sum of the squared changes of the loss.
    """

    def __init__(self, name: str) -> None:
        self.name, self.rows, self.total = name, Moments(), 0.0

    def watch(self, module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        leaf = output.detach().requires_grad_()
        scale = float(getattr(module, "embed_scale", 1.0))  # Gemma 3 multiplies inside

        def count(gradient: Tensor) -> None:
            # Token-wise, so that frequent tokens count as often as they occur.
            weighted = leaf.detach().double().square() * gradient.double().square()
            self.total += float(weighted.sum())
            self.rows.add(self.name, gradient * scale)

        leaf.register_hook(count)  # type: ignore[no-untyped-call]
        return leaf

    def store(self, states: StoredTensors) -> None:
        """Keep what came back until now."""
        self.rows.store("embedding", states)
        states["embedding"] = torch.tensor([self.total], dtype=torch.float64)

    def restore(self, states: StoredTensors, device: torch.device) -> None:
        """Undo :meth:`store`."""
        self.rows.restore("embedding", states, device)
        self.total = float(states["embedding"])


class HeadMoments:
    """Measure what rounding the head costs, from its inputs and the variance of the model's own labels."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.weight = model.get_parameter(f"{name}.weight").detach()
        self.inputs = Moments()
        self.logits = torch.zeros(self.weight.shape[0], dtype=torch.float64)
        self._seen: list[Tensor] = []

    def watch(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen[:] = [args[0].detach()]

    def add(self, probabilities: Tensor, select: Callable[[Tensor], Tensor]) -> None:
        # E[(p - onehot(y))^2] over the model's own labels is p (1 - p): no sampling needed here.
        by_logit = (probabilities - probabilities.square()).sum(0).double()
        self.logits += by_logit.cpu()
        self.inputs.add(self.name, select(self._seen.pop()))

    def mean(self, counted: int, processes: Processes) -> tuple[Tensor, float]:
        """Return the moment that an error of a row is weighed with, and :attr:`Statistics.embedding_sensitivity`."""
        inputs, logits = self.inputs.mean(self.name, counted, processes), processes.sum(self.logits) / counted
        diagonal = inputs.diagonal().double().cpu()
        by_logit = [rows.double().cpu().square() @ diagonal for rows in whole(self.weight).split(_STRIP)]  # type: ignore[no-untyped-call]
        return inputs * float(logits.sum()), 0.5 * float(logits @ torch.cat(by_logit))

    def store(self, states: StoredTensors) -> None:
        """Keep what was seen of the texts that have passed the head."""
        self.inputs.store("head", states)
        states["head"] = self.logits

    def restore(self, states: StoredTensors, device: torch.device) -> None:
        """Undo :meth:`store`."""
        self.inputs.restore("head", states, device)
        self.logits = states["head"]


class _SharedInputs:
    """Find modules of a block that read the same tensor."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self._seen: dict[int, tuple[Tensor, str]] = {}

    def key(self, module: str, tensor: Tensor) -> tuple[str, bool]:
        """Return the key of the tensor's moment, and whether this module is the first to read it."""
        # The tensor is kept, or its id could be given to another one.
        _, key = self._seen.setdefault(id(tensor), (tensor, f"{module}.input"))
        self.keys[module] = key
        return key, key == f"{module}.input"

    def next_batch(self) -> None:
        self._seen.clear()


class BlockInputs:
    """Watch what enters the linear layers of one block.

    Attributes:
        real: which tokens of the batch are no padding; ``None``: all.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers, self.moments, self.shared = layers, Moments(), _SharedInputs()
        self.real: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure whatever passes the layers inside."""
        with _hooked(self.layers, self._see):
            yield

    def _see(self, name: str, _layer: nn.Linear, args: tuple[Any, ...], _output: Tensor) -> None:
        key, first = self.shared.key(name, args[0])
        if first:
            self.moments.add(key, args[0] if self.real is None else args[0][self.real])


class BlockGradients:
    """Watch what comes back to the outputs of the linear layers of one block.

    Attributes:
        sums: by module, of the squared changes of the loss that rounding each weight would make, text by text, where
            texts are ``padded``.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], keys: Mapping[str, str], padded: bool, samples: Samples | None
    ) -> None:
        self.layers, self.keys, self.padded, self.samples = layers, keys, padded, samples
        self.moments = Moments()
        self.sums = dict.fromkeys(layers, 0.0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure whatever passes the layers inside."""
        with _hooked(self.layers, self._see):
            yield

    def _see(self, name: str, layer: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach()
        if self.samples is not None and self.keys[name] == f"{name}.input":
            self.samples.add(self.keys[name], x)

        def receive(gradient: Tensor) -> None:
            self.moments.add(f"{name}.gradient", gradient)  # zero where the input is padding
            if self.samples is not None:
                self.samples.add(f"{name}.gradient", gradient)
            if self.padded:
                by_text = torch.einsum("nto,nti->noi", gradient.float(), x.float())
                self.sums[name] += float((by_text * layer.weight).square().sum())

        output.register_hook(receive)  # type: ignore[no-untyped-call]


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], see: Callable[..., None]) -> Iterator[None]:
    """Have ``see`` called with the name of every linear layer that computes, and with what forward hooks get."""
    handles = []
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)  # load_model has checked it
        handles.append(layer.register_forward_hook(partial(see, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
