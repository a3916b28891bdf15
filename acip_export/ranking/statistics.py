"""Collect second moments of every linear layer's inputs and output gradients, block by block.

H = E[x x^T] and G = E[g g^T], both per token, where g is the gradient of the summed loss at the layer's output and the
labels are drawn from the model's own distribution: 1/2 tr(G dW H dW^T) is then the Kronecker-factored Fisher estimate
of what a change dW costs, in nats per token (Martens and Grosse 2015, arXiv 1503.05671).

Where a text, not a token, is what a loss is counted by, G is summed over the text's tokens. The estimate then takes
the tokens of a text for independent, and they are not: pooling sends all of them the same gradient. For the rounding
of a whole weight the exact sum costs no more than a backward pass: 1/2 sum_ij W_ij^2 E[(sum_t g_ti x_tj)^2].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acip_export.ranking.block_sweep import BlockSweep, backward_step, forward_step
from acip_export.ranking.context import RankContext
from acip_export.ranking.load import embedding_names
from acip_export.ranking.stored_moments import Samples, StoredMoments
from acip_export.ranking.watching import BlockGradients, BlockInputs, EmbeddingMoments, HeadMoments

# Gradients of few tokens say little about how outputs go together: G is drawn towards its diagonal as if so many tokens
# had been seen whose gradients do not.
_UNCORRELATED = 1024
_TURN, _STEP = "turn", "statistics"


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


def collect_statistics(context: RankContext, samples: bool = False) -> Statistics:
    """Go forward over the context's windows and backward over the first of them, block by block.

    H is per token, G per what the task counts, so that 1/2 tr(G dW H dW^T) is in the task's unit. Several processes
    share the windows; each batch draws its labels from a generator of its own, so that it does not matter which one
    has it. What the context's work has of it already is not done again.

    Memory: one (in, in) matrix per distinct input, later one (out, out) per module, of one block, float32, beside the
    weights of that block and its activations for one batch. On disk: the hidden states of all windows that go backward
    at every block, the moments, and the samples.

    Args:
        samples: whether inputs and gradients of single tokens are kept for the Fisher information.
    """
    checkpoint, work = context.checkpoint, context.work
    kept = Samples(work.scratch("samples")) if samples else None
    inputs = StoredMoments(work.scratch("inputs"))
    gradients = StoredMoments(
        work.scratch("gradients"), lambda key: checkpoint.read(f"{key.removesuffix('.gradient')}.weight")
    )
    facts = work.facts(_STEP) if _STEP in work else _collect(context, inputs, gradients, kept)
    return Statistics(
        inputs=inputs,
        gradients=gradients,
        gradient_keys={name: f"{name}.gradient" for name in checkpoint.linear_modules},
        samples=kept,
        **facts,
    )


def _collect(
    context: RankContext, inputs: StoredMoments, gradients: StoredMoments, kept: Samples | None
) -> dict[str, Any]:
    """Fill moments and samples, and return what else statistics hold."""
    checkpoint, model, task, processes = context.checkpoint, context.model, context.task, context.processes
    windows, graded, device = context.windows, context.graded, next(context.model.parameters()).device
    if len(windows) - len(graded) < processes.count:
        windows = graded  # too few are left to go forward only
    keys: dict[str, str] = {}
    embedding_name, head_name = embedding_names(model)
    embedding = EmbeddingMoments(embedding_name)
    head = None if head_name is None else HeadMoments(model, head_name)
    tokens, counted = task.tokens(windows), task.counted(graded)
    shrink = _UNCORRELATED / (_UNCORRELATED + task.tokens(graded))
    sums = dict.fromkeys(checkpoint.linear_modules, 0.0)

    def tail(first: int, part: Tensor) -> float:
        generator = torch.Generator().manual_seed((context.seed << 32) + first)
        loss = task.backward_sampled(model, part, generator, None if head is None else head.add)
        return loss / task.counted(part)

    handles = [model.get_submodule(embedding_name).register_forward_hook(embedding.watch)]
    if head_name is not None and head is not None:
        handles.append(model.get_submodule(head_name).register_forward_pre_hook(head.watch))
    backward, forward = processes.batches(graded, context.batch), []
    if len(windows) > len(graded):
        forward = processes.batches(windows[len(graded) :], context.batch)
    batches = [*backward, *((len(graded) + first, part) for first, part in forward)]
    batches = [(first, task.trimmed(part.to(device))) for first, part in batches]
    sweep = BlockSweep(context, "statistics", batches, len(backward), len(windows), len(graded))
    work, states = context.work, sweep.states
    try:
        for block in sweep.blocks.names:
            keys |= work.facts(forward_step(block)) if forward_step(block) in work else {}
        for block, steps in sweep.forward():
            seen = BlockInputs({name: model.get_submodule(name) for name in sweep.blocks.members[block]})
            with seen.watching():
                for part, step in steps:
                    seen.real = task.real(part)
                    step()
                    seen.shared.next_batch()
            seen.moments.put(inputs, tokens, processes)
            keys |= seen.shared.keys
            work.finish(forward_step(block), seen.shared.keys)
        if _TURN not in work:
            sweep.turn(tail)
            if head is not None:
                head.store(states)
            work.finish(_TURN)
        elif head is not None:
            head.restore(states, device)
        for block in sweep.blocks.names:
            if backward_step(block) in work:
                sums |= work.facts(backward_step(block))
                embedding.restore(states, device)
        for block, steps in sweep.backward():
            layers = {name: model.get_submodule(name) for name in sweep.blocks.members[block]}
            sent = BlockGradients(layers, keys, task.padding is not None, kept)
            with sent.watching():
                for _, step in steps:
                    step()
            sent.moments.put(gradients, counted, processes, shrink)
            sums |= sent.sums
            embedding.store(states)
            work.finish(backward_step(block), sent.sums)
    finally:
        for handle in handles:
            handle.remove()

    joined = torch.tensor([embedding.total, *sums.values()], dtype=torch.float64)
    total, *by_module = processes.sum(joined).tolist()
    sensitivity = {f"{embedding_name}.weight": 0.5 * total / counted}
    weighing = {f"{embedding_name}.weight": embedding.rows.mean(embedding_name, counted, processes)}
    if head is not None:
        head_tensor = f"{embedding_name}.weight" if checkpoint.shape.tied_embeddings else f"{head_name}.weight"
        moment, loss = head.mean(counted, processes)
        sensitivity[head_tensor] = sensitivity.get(head_tensor, 0.0) + loss
        weighing[head_tensor] = weighing[head_tensor] + moment if head_tensor in weighing else moment
    inputs.store(weighing)
    rounding = {name: 0.5 * part / counted for name, part in zip(sums, by_module, strict=True)}
    facts = {
        "input_keys": {name: keys[name] for name in checkpoint.linear_modules},
        "embedding_sensitivity": sensitivity,
        "tokens": tokens,
        "sensitivity": {} if task.padding is None else rounding,
    }
    work.finish(_STEP, facts)
    sweep.close()
    return facts
