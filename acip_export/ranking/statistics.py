"""Collect second moments of every linear layer's inputs and output gradients, in one streaming pass.

H = E[x x^T] and G = E[g g^T], both per token, where g is the gradient of the summed loss at the layer's output and the
labels are drawn from the model's own distribution: 1/2 tr(G dW H dW^T) is then the Kronecker-factored Fisher estimate
of what a change dW costs, in nats per token (Martens and Grosse 2015, arXiv 1503.05671).

Where a text, not a token, is what a loss is counted by, G is summed over the text's tokens. The estimate then takes
the tokens of a text for independent, and they are not: pooling sends all of them the same gradient. For the rounding
of a whole weight the exact sum costs no more than a backward pass: 1/2 sum_ij W_ij^2 E[(sum_t g_ti x_tj)^2].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acip_export.progress import Clock
from acip_export.ranking.context import RankContext
from acip_export.ranking.load import embedding_names
from acip_export.ranking.processes import Processes
from acip_export.ranking.sharding import whole
from acip_export.ranking.tasks import Task


@dataclass(frozen=True)
class Statistics:
    """Hold what one pass over calibration text says about a model.

    Attributes:
        inputs: (in, in) float64 by key; modules that read the same tensor share one.
        gradients: (out, out) float64 by key.
        input_keys, gradient_keys: by module.
        embedding_sensitivity: by tensor name: predicted loss, in the task's unit, of rounding the embedding or head
            with a relative mean square error of one; the sum of both uses where they are tied.
        tokens: how many went in.
        sensitivity: by module, as :func:`dense_sensitivity`, but measured text by text; empty for causal models.
    """

    inputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    input_keys: Mapping[str, str]
    gradient_keys: Mapping[str, str]
    embedding_sensitivity: Mapping[str, float]
    tokens: int
    sensitivity: Mapping[str, float]

    def input_of(self, module: str) -> Tensor:
        return self.inputs[self.input_keys[module]]

    def gradient_of(self, module: str) -> Tensor:
        return self.gradients[self.gradient_keys[module]]


class _Moments:
    """Sum outer products: batches in the model's precision, the sum in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, key: str, rows: Tensor) -> None:
        rows = rows.detach().flatten(0, -2).float()
        product = (rows.T @ rows).double().cpu()
        self.sums[key] = self.sums[key] + product if key in self.sums else product

    def sum_over(self, processes: Processes) -> None:
        self.sums = {key: processes.sum(total) for key, total in self.sums.items()}

    def mean(self, tokens: int) -> dict[str, Tensor]:
        # Rounded to what the score file stores: whoever factorizes from the file must find the same components.
        return {key: (total / tokens).float().double() for key, total in self.sums.items()}


class _HeadMoments:
    """Measure what rounding the head costs, from its inputs and the variance of the model's own labels."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.weight = whole(model.get_parameter(f"{name}.weight").detach()).double().cpu()
        self.inputs = torch.zeros(self.weight.shape[1], dtype=torch.float64)
        self.logits = torch.zeros(self.weight.shape[0], dtype=torch.float64)
        self._seen: list[Tensor] = []

    def watch(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen.append(args[0])

    def add(self, task: Task, logits: Tensor, windows: Tensor) -> None:
        probabilities = logits.float().softmax(-1)
        # E[(p - onehot(y))^2] over the model's own labels is p (1 - p): no sampling needed here.
        self.logits += (probabilities * (1 - probabilities)).sum(0).double().cpu()
        self.inputs += task.select(self._seen.pop().detach(), windows).double().square().sum(0).cpu()

    def sum_over(self, processes: Processes) -> None:
        self.inputs, self.logits = processes.sum(self.inputs), processes.sum(self.logits)

    def loss(self, counted: int) -> float:
        return 0.5 * float((self.logits / counted) @ self.weight.square() @ (self.inputs / counted))


class _SharedInputs:
    """Find modules that read the same tensor, within one forward pass."""

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


def collect_statistics(context: RankContext) -> Statistics:
    """Go forward and backward over the context's windows once; parameters get no gradients.

    H is per token, G per what the task counts, so that 1/2 tr(G dW H dW^T) is in the task's unit. Several processes
    share the windows; each batch draws its labels from a generator of its own, so that it does not matter which one
    has it.

    Memory: one (in, in) matrix per distinct input and one (out, out) per module, float64, beside one batch.
    """
    checkpoint, model, task, processes = context.checkpoint, context.model, context.task, context.processes
    windows = context.windows
    inputs, gradients, shared = _Moments(), _Moments(), _SharedInputs()
    embedding, head_name = embedding_names(model)
    head = None if head_name is None else _HeadMoments(model, head_name)
    sums = dict.fromkeys(["embedding", *checkpoint.linear_modules], 0.0)
    real: list[Tensor | None] = [None]
    handles = []

    def watch(name: str, layer: nn.Linear) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            key, first = shared.key(name, args[0])
            if first:
                inputs.add(key, args[0] if real[0] is None else args[0][real[0]])
            mask, x = real[0], args[0]

            def receive(gradient: Tensor) -> None:
                gradients.add(f"{name}.gradient", gradient)  # zero where the input is padding
                if mask is not None:
                    by_text = torch.einsum("nto,nti->noi", gradient.float(), x.detach().float())
                    sums[name] += float((by_text * layer.weight).square().sum())

            output.register_hook(receive)  # type: ignore[no-untyped-call]

        return hook

    def start(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()

        def count(gradient: Tensor) -> None:
            # Token-wise, so that frequent tokens count as often as they occur.
            weighted = leaf.detach().double().square() * gradient.double().square()
            sums["embedding"] += float(weighted.sum())

        leaf.register_hook(count)  # type: ignore[no-untyped-call]
        return leaf

    for name in checkpoint.linear_modules:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)  # load_model has checked it
        handles.append(layer.register_forward_hook(watch(name, layer)))
    handles.append(model.get_submodule(embedding).register_forward_hook(start))
    if head_name is not None and head is not None:
        handles.append(model.get_submodule(head_name).register_forward_pre_hook(head.watch))

    clock = Clock("statistics", len(windows), context.progress, tokens=windows.shape[1])
    device = next(model.parameters()).device
    try:
        for first_window, part in processes.batches(windows, context.batch):
            part = task.trimmed(part.to(device))
            real[0] = task.real(part)
            outputs = task.outputs(model, part)
            if head is not None:
                head.add(task, outputs.detach(), part)
            loss = task.sampled_loss(outputs, torch.Generator().manual_seed((context.seed << 32) + first_window))
            loss.backward()  # type: ignore[no-untyped-call]
            shared.next_batch()
            clock.advance(len(part) * processes.count, loss=loss.item() / task.counted(part))
    finally:
        for handle in handles:
            handle.remove()

    inputs.sum_over(processes)
    gradients.sum_over(processes)
    sums = dict(zip(sums, processes.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist(), strict=True))
    if head is not None:
        head.sum_over(processes)
    tokens, counted = task.tokens(windows), task.counted(windows)
    sensitivity = {f"{embedding}.weight": 0.5 * sums.pop("embedding") / counted}
    if head is not None:
        head_tensor = f"{embedding}.weight" if checkpoint.shape.tied_embeddings else f"{head_name}.weight"
        sensitivity[head_tensor] = sensitivity.get(head_tensor, 0.0) + head.loss(counted)
    return Statistics(
        inputs=inputs.mean(tokens),
        gradients=gradients.mean(counted),
        input_keys=dict(shared.keys),
        gradient_keys={name: f"{name}.gradient" for name in checkpoint.linear_modules},
        embedding_sensitivity=sensitivity,
        tokens=tokens,
        sensitivity={} if task.padding is None else {name: 0.5 * total / counted for name, total in sums.items()},
    )
