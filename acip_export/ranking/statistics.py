"""Collect second moments of every linear layer's inputs and output gradients, block by block.

H = E[x x^T] and G = E[g g^T], both per token, where g is the gradient of the summed loss at the layer's output and the
labels are drawn from the model's own distribution: 1/2 tr(G dW H dW^T) is then the Kronecker-factored Fisher estimate
of what a change dW costs, in nats per token (Martens and Grosse 2015, arXiv 1503.05671).

Where a text, not a token, is what a loss is counted by, G is summed over the text's tokens. The estimate then takes
the tokens of a text for independent, and they are not: pooling sends all of them the same gradient. For the rounding
of a whole weight the exact sum costs no more than a backward pass: 1/2 sum_ij W_ij^2 E[(sum_t g_ti x_tj)^2].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from acip_export.artifacts.scores import FloatArray
from acip_export.io.scratch import Scratch
from acip_export.lowrank.moments import PackedMoment, pack_gradients, pack_moment
from acip_export.lowrank.whitening import Whitening
from acip_export.ranking.block_sweep import BlockSweep
from acip_export.ranking.context import RankContext
from acip_export.ranking.load import embedding_names
from acip_export.ranking.processes import Processes
from acip_export.ranking.sharding import whole
from acip_export.ranking.side_by_side import side_by_side
from acip_export.ranking.stored_tensors import StoredTensors

# Rows of a triangle, and of a head, that are worked on at a time.
_STRIP = 256
# Gradients of few tokens say little about how outputs go together: G is drawn towards its diagonal as if so many tokens
# had been seen whose gradients do not.
_UNCORRELATED = 1024


@dataclass(frozen=True)
class Statistics:
    """Hold what one pass over calibration text says about a model.

    Attributes:
        inputs: (in, in) float64 by key, read when asked for; modules that read the same tensor share one. Under the
            names of embedding and head, what an error in a row of them is weighed with: the second moment of the
            gradients at the embedding's rows, or of the head's inputs times the variance of its labels; the sum of
            both where they are tied.
        gradients: (out, out) float64 by key, read when asked for.
        input_keys, gradient_keys: by module.
        embedding_sensitivity: by tensor name: predicted loss, in the task's unit, of rounding the embedding or head
            with a relative mean square error of one; the sum of both uses where they are tied.
        tokens: how many went in.
        sensitivity: by module, as :func:`dense_sensitivity`, but measured text by text; empty for causal models.
        samples: by the same keys, if they were wanted.
    """

    inputs: StoredMoments
    gradients: StoredMoments
    input_keys: Mapping[str, str]
    gradient_keys: Mapping[str, str]
    embedding_sensitivity: Mapping[str, float]
    tokens: int
    sensitivity: Mapping[str, float]
    samples: Samples | None = None

    def input_diagonal(self, module: str) -> Tensor:
        """Return the diagonal of H, (in,) float64, exact."""
        return torch.from_numpy(self.inputs.diagonal(self.input_keys[module])).double()

    def gradient_diagonal(self, module: str) -> Tensor:
        """Return the diagonal of G, (out,) float64, exact."""
        return torch.from_numpy(self.gradients.diagonal(self.gradient_keys[module])).double()


class StoredMoments(Mapping[str, Tensor]):
    """Hold second moments in a scratch file as the score file stores them, so that one of them is in memory at a time.

    Whoever factorizes from the score file finds the same components therefore.

    Args:
        weight_of: gives the weight whose output gradients a moment is of; ``None``: the moments are of inputs.
    """

    def __init__(self, scratch: Scratch, weight_of: Callable[[str], Tensor] | None = None) -> None:
        self._scratch, self._weight_of = scratch, weight_of
        self._diagonals: dict[str, FloatArray] = {}

    def store(self, moments: Mapping[str, Tensor]) -> None:
        """Keep symmetric matrices, of which the upper triangles are looked at.

        Raises:
            ScoreFileError: see :func:`pack_moment`.
        """

        def pack(key: str) -> PackedMoment:
            name = f"the second moment {key!r}"
            if self._weight_of is None:
                return pack_moment(moments[key], name)
            return pack_gradients(moments[key], self._weight_of(key), name)

        for key, packed in side_by_side(pack, list(moments)):
            self._diagonals[key] = moments[key].diagonal().float().clamp_min(0).cpu().numpy()
            self._scratch.write(f"{key}/rows", packed.rows)
            self._scratch.write(f"{key}/codes", packed.codes)

    def packed(self, key: str) -> PackedMoment:
        """Read a moment as the score file has it."""
        rows, codes = self._scratch.read(f"{key}/rows"), self._scratch.read(f"{key}/codes")
        return PackedMoment.of(cast("FloatArray", rows), codes.view(np.uint8))

    def diagonal(self, key: str) -> FloatArray:
        """Return the diagonal alone, exactly."""
        return self._diagonals[key]

    def whitening(self, key: str) -> Whitening:
        """Read a moment."""
        packed, diagonal = self.packed(key), self._diagonals[key]
        found = Whitening.packed(packed)
        if packed.size == len(diagonal):
            return found
        assert self._weight_of is not None
        return Whitening.lifted(found, diagonal, self._weight_of(key))

    def __getitem__(self, key: str) -> Tensor:
        return self.whitening(key).moment

    def __contains__(self, key: object) -> bool:
        return key in self._diagonals  # Mapping's own would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._diagonals)

    def __len__(self) -> int:
        return len(self._diagonals)


class _Moments:
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

    def store(self, moments: StoredMoments, count: int, processes: Processes, shrink: float = 0.0) -> None:
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


class _HeadMoments:
    """Measure what rounding the head costs, from its inputs and the variance of the model's own labels."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.weight = model.get_parameter(f"{name}.weight").detach()
        self.inputs = _Moments()
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


class Samples:
    """Keep inputs and output gradients of linear layers, token by token and batch by batch, in a scratch file.

    In bfloat16: they go into sums of thousands, whose sampling error is far larger.
    """

    def __init__(self, directory: Path | None) -> None:
        self._stored = StoredTensors(directory)
        self._counts: Counter[str] = Counter()

    def add(self, key: str, rows: Tensor) -> None:
        """Keep (n, length, width) of one batch."""
        self._stored[f"{key}/{self._counts[key]}"] = rows.detach().bfloat16()
        self._counts[key] += 1

    def of(self, key: str) -> Iterator[Tensor]:
        """Read what was kept, batch by batch, in float32."""
        for number in range(self._counts[key]):
            yield self._stored[f"{key}/{number}"].float()


def collect_statistics(context: RankContext, samples: bool = False) -> Statistics:
    """Go forward over the context's windows and backward over the first of them, block by block.

    H is per token, G per what the task counts, so that 1/2 tr(G dW H dW^T) is in the task's unit. Several processes
    share the windows; each batch draws its labels from a generator of its own, so that it does not matter which one
    has it.

    Memory: one (in, in) matrix per distinct input, later one (out, out) per module, of one block, float32, beside the
    weights of that block and its activations for one batch. On disk: the hidden states of all windows that go backward
    at every block, the moments, and the samples.

    Args:
        samples: whether inputs and gradients of single tokens are kept for the Fisher information.
    """
    checkpoint, model, task, processes = context.checkpoint, context.model, context.task, context.processes
    windows, graded, device = context.windows, context.graded, next(context.model.parameters()).device
    if len(windows) - len(graded) < processes.count:
        windows = graded  # too few are left to go forward only
    kept = Samples(context.scratch) if samples else None
    inputs = StoredMoments(Scratch(context.scratch))
    gradients = StoredMoments(
        Scratch(context.scratch), lambda key: checkpoint.read(f"{key.removesuffix('.gradient')}.weight")
    )
    keys: dict[str, str] = {}
    embedding, head_name = embedding_names(model)
    head = None if head_name is None else _HeadMoments(model, head_name)
    tokens, counted = task.tokens(windows), task.counted(graded)
    shrink = _UNCORRELATED / (_UNCORRELATED + task.tokens(graded))
    sums = dict.fromkeys(["embedding", *checkpoint.linear_modules], 0.0)
    rows = _Moments()

    def start(module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        leaf = output.detach().requires_grad_()
        scale = float(getattr(module, "embed_scale", 1.0))  # Gemma 3 multiplies inside

        def count(gradient: Tensor) -> None:
            # Token-wise, so that frequent tokens count as often as they occur.
            weighted = leaf.detach().double().square() * gradient.double().square()
            sums["embedding"] += float(weighted.sum())
            rows.add(embedding, gradient * scale)

        leaf.register_hook(count)  # type: ignore[no-untyped-call]
        return leaf

    def tail(first: int, part: Tensor) -> float:
        generator = torch.Generator().manual_seed((context.seed << 32) + first)
        loss = task.backward_sampled(model, part, generator, None if head is None else head.add)
        return loss / task.counted(part)

    handles = [model.get_submodule(embedding).register_forward_hook(start)]
    if head_name is not None and head is not None:
        handles.append(model.get_submodule(head_name).register_forward_pre_hook(head.watch))
    backward, forward = processes.batches(graded, context.batch), []
    if len(windows) > len(graded):
        forward = processes.batches(windows[len(graded) :], context.batch)
    batches = [*backward, *((len(graded) + first, part) for first, part in forward)]
    batches = [(first, task.trimmed(part.to(device))) for first, part in batches]
    sweep = BlockSweep(context, "statistics", batches, len(backward), len(windows), len(graded))
    try:
        for block, steps in sweep.forward():
            seen = _BlockInputs({name: model.get_submodule(name) for name in sweep.blocks.members[block]})
            with seen.watching():
                for part, step in steps:
                    seen.real = task.real(part)
                    step()
                    seen.shared.next_batch()
            seen.moments.store(inputs, tokens, processes)
            keys |= seen.shared.keys
        sweep.turn(tail)
        for block, steps in sweep.backward():
            layers = {name: model.get_submodule(name) for name in sweep.blocks.members[block]}
            sent = _BlockGradients(layers, keys, task.padding is not None, kept)
            with sent.watching():
                for _, step in steps:
                    step()
            sent.moments.store(gradients, counted, processes, shrink)
            sums |= sent.sums
    finally:
        sweep.close()
        for handle in handles:
            handle.remove()

    sums = dict(zip(sums, processes.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist(), strict=True))
    sensitivity = {f"{embedding}.weight": 0.5 * sums.pop("embedding") / counted}
    weighing = {f"{embedding}.weight": rows.mean(embedding, counted, processes)}
    if head is not None:
        head_tensor = f"{embedding}.weight" if checkpoint.shape.tied_embeddings else f"{head_name}.weight"
        moment, loss = head.mean(counted, processes)
        sensitivity[head_tensor] = sensitivity.get(head_tensor, 0.0) + loss
        weighing[head_tensor] = weighing[head_tensor] + moment if head_tensor in weighing else moment
    inputs.store(weighing)
    return Statistics(
        inputs=inputs,
        gradients=gradients,
        input_keys={name: keys[name] for name in checkpoint.linear_modules},
        gradient_keys={name: f"{name}.gradient" for name in checkpoint.linear_modules},
        embedding_sensitivity=sensitivity,
        tokens=tokens,
        sensitivity={} if task.padding is None else {name: 0.5 * total / counted for name, total in sums.items()},
        samples=kept,
    )


class _BlockInputs:
    """Watch what enters the linear layers of one block.

    Attributes:
        real: which tokens of the batch are no padding; ``None``: all.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers, self.moments, self.shared = layers, _Moments(), _SharedInputs()
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


class _BlockGradients:
    """Watch what comes back to the outputs of the linear layers of one block.

    Attributes:
        sums: by module, of the squared changes of the loss that rounding each weight would make, text by text, where
            texts are ``padded``.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], keys: Mapping[str, str], padded: bool, samples: Samples | None
    ) -> None:
        self.layers, self.keys, self.padded, self.samples = layers, keys, padded, samples
        self.moments = _Moments()
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
