"""Tune an export by gradient descent on the divergence from the dense model.

Of dense matrices the codes are chosen and stay: a block's scale is multiplied by a gain. The numbers of norms and
biases are moved, and so are those of factor pairs, which are rounded afterwards. On the calibration text the export
then predicts what the dense model predicts: the objective of a learned ranking. The files keep their bytes.

A step goes forward block by block and keeps what each block reads, then backward block by block, each computed again
with its gradients. Memory holds one block's weights, dense and tuned, and their gradients, those of embedding and head,
and the hidden states of one step's text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from acip_export.artifacts.materialized import stored_tensors
from acip_export.artifacts.plan import Plan, TensorDecision, plan_sha256
from acip_export.artifacts.tuned import Tuned, TuningResult
from acip_export.io.kept_states import read_state, try_to_write_state
from acip_export.io.prefetch import one_ahead
from acip_export.io.scratch import Scratch
from acip_export.machine import fast_bfloat16
from acip_export.materialization.factors import Pair
from acip_export.materialization.rounded_weights import RoundedPlan, RoundedRows, RoundedWeights
from acip_export.measurement.block_passes import BlockPasses, pieces
from acip_export.measurement.pair_descent import PairDescent
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Clock, ProgressCallback, silent
from acip_export.units import ceil_div
from acip_export.weight_types import weight_type

# Of Adam, of moves relative to what is moved; it falls to nothing with the last step.
LEARNING_RATE = 5e-4
# Of pairs, as a share of the root mean square of a factor.
PAIR_RATE = 1e-3
# Of a step: gradients of fewer tokens are noise, of more they take longer than they gain.
STEP_TOKENS = 512
# Steps that tell how long one takes, the first of them aside, and the fewest that are worth their while.
_TIMED_STEPS, _LEAST_STEPS = 4, 4
# A process that is killed loses at most so many seconds, or so many times as long as saving takes.
_SAVE_SECONDS, _TIMES_SAVING = 60.0, 20.0
# Logits that are made at once, several times over with what their gradients need.
_LOGITS = 2**23
# What is told of before the steps, of them, and after them.
_BEGUN, _STAGE, _COMPARED = "round what is tuned", "tune", "compare what is tuned"


def tune(
    checkpoint: Checkpoint,
    weights: RoundedWeights,
    plan: Plan,
    tunable: Collection[str],
    text: Tensor,
    held_out: Tensor,
    seconds: float,
    state: Path | None = None,
    progress: ProgressCallback = silent,
) -> Tuned:
    """Tune the export of ``plan``.

    Args:
        weights: of the plan's format. tunable: its types whose scales can be multiplied.
        text, held_out: windows (n, tokens) to tune on, and to compare before and after on.
        seconds: for the steps, about; what they begin with is made before, and compared after.
        state: file that is kept up to date with the run; if it is there, the run in it goes on, to the same result.

    Returns:
        The tuned numbers; none where they don't come nearer to the dense model on ``held_out``.

    Raises:
        UnsupportedError: the blocks of the model are no chain.
    """
    passes = BlockPasses(checkpoint, held_out)
    scratch = Scratch(None, "the weights that are tuned")
    student = _Student(passes, weights.of(plan, inputs=False), tunable, scratch, progress)
    narrow = any(info.dtype == "BF16" for info in checkpoint.tensors.values())
    identity = f"{plan_sha256(plan)}, pairs too"
    run = _Run(passes, student, text, checkpoint.shape.vocabulary, identity, state, narrow)
    run.go_on(seconds, progress)
    passes.windows = held_out
    factors = student.factors()
    # Of pairs as they began: making them from the ranking again takes minutes.
    untuned = weights.of(plan, factors=_stored_factors(student.pairs, student.pairs.start))
    variants = untuned, _Moved(student, weights.of(plan, factors=factors))
    clock = Clock(_COMPARED, len(passes.model.names) * (1 + len(variants)), progress)
    before, after = passes.divergences(variants, clock.advance)
    result = TuningResult(run.step, run.step * run.step_tokens, round(run.seconds, 1), before.kl, after.kl)
    if not result.kept:
        return Tuned(result, {}, {}, {})
    return Tuned(result, student.gains(), student.vectors(), factors)


class _Student:
    """The rounded model, and how far everything that is tuned has been moved from where it was.

    Attributes:
        moves: by name: of a matrix (rows, blocks) less one of its gains; of a vector (n,) in units of its size.
        pairs: that are moved themselves.
    """

    def __init__(
        self,
        passes: BlockPasses,
        rounded: RoundedPlan,
        tunable: Collection[str],
        scratch: Scratch,
        progress: ProgressCallback = silent,
    ) -> None:
        self._scratch = scratch
        # Of rounded matrices, how many columns share a gain; 0: it has none.
        self._blocks: dict[str, int] = {}
        self._vectors: dict[str, tuple[Tensor, Tensor]] = {}
        self.moves: dict[str, Tensor] = {}
        self.pairs = PairDescent(scratch)
        decisions = {decision.name: decision for decision in rounded.plan.tensors}
        clock = Clock(_BEGUN, len(passes.model.parameters), progress)
        for names in passes.model.parameters.values():
            changed = rounded.tensors([name for name in names if not _is_pair(decisions.get(name))])
            for name in names:
                decision = decisions.get(name)
                if decision is not None and _is_pair(decision):
                    self.pairs.add(name, rounded.pair(decision))
                elif name in changed and changed[name].ndim == 2:
                    scratch.write(name, changed[name].half().numpy())
                    block = 0
                    if decision is not None and decision.rank is None and decision.type in tunable:
                        block = weight_type(rounded.plan.format, decision.type or "").block
                        rows, columns = changed[name].shape
                        self.moves[name] = torch.zeros(rows, ceil_div(columns, block))
                    self._blocks[name] = block
                elif decision is not None and len(decision.shape) == 1:
                    value = changed[name] if name in changed else passes.model.stored.read(name)
                    sizes = value.abs()
                    self._vectors[name] = value, sizes.clamp_min(float(sizes.mean()))
                    self.moves[name] = torch.zeros_like(value)
            clock.advance()
        for move in self.moves.values():
            move.requires_grad_()

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the named tensors that differ from the dense model's, as functions of the moves."""
        found = {}
        for name in names:
            if name in self._blocks:
                found[name] = self._matrix(name, self._blocks[name])
            elif name in self.pairs:
                found[name] = self.pairs.product(name)
            elif name in self._vectors:
                value, sizes = self._vectors[name]
                found[name] = value + self.moves[name] * sizes
        return found

    def _matrix(self, name: str, block: int) -> Tensor:
        weight = torch.from_numpy(self._scratch.read(name)).float()
        return multiplied(weight, 1 + self.moves[name], block) if block else weight

    def gains(self) -> dict[str, Tensor]:
        """Return what scales are multiplied with, float16."""
        return {name: (1 + self.moves[name].detach()).half() for name, block in self._blocks.items() if block}

    def factors(self) -> dict[str, Tensor]:
        """Return the factors of pairs by the names that exports store them under, float16."""
        return _stored_factors(self.pairs, self.pairs.pair)

    @torch.no_grad()
    def vectors(self) -> dict[str, Tensor]:
        """Return norms and biases."""
        return {name: each.detach().clone() for name, each in self.tensors([*self._vectors]).items()}


def multiplied(weight: Tensor, gains: Tensor, block: int) -> Tensor:
    """Multiply ``block`` columns at a time by a gain of their own, (rows, blocks)."""
    rows, columns = weight.shape
    padded = pad(weight, (0, -columns % block)).view(rows, -1, block)
    return (padded * gains[..., None]).view(rows, -1)[:, :columns]


def _stored_factors(names: Iterable[str], pair_of: Callable[[str], Pair]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in names:
        pair = pair_of(name)
        up, down = pair.up.half(), pair.down.half()
        found |= zip(stored_tensors(name, (len(up), down.shape[1]), len(down)), (up, down), strict=True)
    return found


def _is_pair(decision: TensorDecision | None) -> bool:
    """Tell pairs in the place of a weight from what corrects one, which stays as it is."""
    return decision is not None and decision.kept is not None


class _Moved:
    """The tuned model as a variant that is measured; its pairs and its inputs are rounded as the runtime has them."""

    def __init__(self, student: _Student, rounded: RoundedPlan) -> None:
        self._student, self._rounded = student, rounded

    def tensors(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """See :class:`acip_export.measurement.block_passes.Variant`."""
        pairs = [name for name in names if name in self._student.pairs]
        return {**self._student.tensors([n for n in names if n not in pairs]), **self._rounded.tensors(pairs)}

    def rows(self, name: str) -> RoundedRows | None:
        """See :class:`acip_export.measurement.block_passes.Variant`."""
        moved = self._student.tensors([name])
        return None if not moved else RoundedRows(("moved", name), moved[name].__getitem__)

    def input_blocks(self, names: Sequence[str]) -> Mapping[str, int]:
        """See :class:`acip_export.measurement.block_passes.Variant`."""
        return self._rounded.input_blocks(names)


class _Run:
    """Gradient descent that can be stopped between two steps.

    Args:
        narrow: whether products may be of bfloat16, where processors have them: twice as many steps fit into the time.

    Attributes:
        step: how many are done. steps: how many there will be, once that is known. seconds: that they took.
        step_tokens: of the text of one.
    """

    def __init__(
        self,
        passes: BlockPasses,
        student: _Student,
        text: Tensor,
        vocabulary: int,
        identity: str,
        state: Path | None,
        narrow: bool = False,
    ) -> None:
        self._passes, self._student, self._state = passes, student, state
        self._vocabulary, self._identity = vocabulary, identity
        self._narrow = narrow and fast_bfloat16()
        count = max(1, STEP_TOKENS // text.shape[1])
        self._text, self._windows = text, min(count, len(text))
        self.step_tokens = self._windows * text.shape[1]
        self._optimizer = torch.optim.Adam(student.moves.values(), lr=LEARNING_RATE)
        self.step, self.steps, self.seconds = 0, 0, 0.0
        self._share_left = 1.0
        if state is not None:
            self._load(state)

    def go_on(self, seconds: float, progress: ProgressCallback) -> None:
        """Make the steps that fit into so many seconds, unless their number is known from before."""
        saved, took, first = time.monotonic(), 0.0, 0.0
        clock = Clock(_STAGE, self.steps or None, progress, self.step_tokens, self.step)
        while not self.steps or self.step < self.steps:
            begin = time.monotonic()
            self._share_left = 1 - self.step / self.steps if self.steps else 1.0
            self._optimizer.param_groups[0]["lr"] = LEARNING_RATE * self._share_left
            # Without a cache, which would hold the pairs of all blocks until the step ends.
            with torch.autocast("cpu", torch.bfloat16, enabled=self._narrow, cache_enabled=False):
                loss = self._descend()
            self.step += 1
            self.seconds += time.monotonic() - begin
            if self.step == 1:
                first = self.seconds
            if not self.steps and self.step == _TIMED_STEPS:
                each = (self.seconds - first) / (_TIMED_STEPS - 1)
                self.steps = max(_LEAST_STEPS, int((seconds - self.seconds) / each) + _TIMED_STEPS)
                clock.total = self.steps
            clock.advance(loss=loss)
            begin = time.monotonic()
            if begin - saved > max(_SAVE_SECONDS, _TIMES_SAVING * took):
                self._save()
                saved = time.monotonic()
                took = saved - begin
        self._save()

    def _descend(self) -> float:
        """Make one step, and return the divergence before it."""
        first = self.step * self._windows
        chosen = torch.arange(first, first + self._windows) % len(self._text)
        passes = self._passes
        passes.windows = self._text[chosen]
        for move in self._student.moves.values():
            move.grad = None
        model = passes.model
        outside = self._student.tensors(model.parameters[""])
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in outside.items()}
        with torch.no_grad():
            dense, arguments = passes.enter()
            entered, _ = passes.enter(self._outside(leaves))
            read = [entered]
            for number, (name, weights) in enumerate(one_ahead(model.read_block, model.names)):
                dense = passes.through(number, weights, dense, arguments)
                read.append(passes.through(number, self._of_block(name, weights), read[-1], arguments))
        loss, gradient = self._head(leaves, dense, read.pop())
        backward = zip(
            reversed(range(len(model.names))), one_ahead(model.read_block, reversed(model.names)), strict=True
        )
        for number, (name, weights) in backward:
            inputs = read.pop().requires_grad_()
            left = passes.through(number, self._of_block(name, weights), inputs, arguments)
            left.backward(gradient)  # type: ignore[no-untyped-call]
            self._student.pairs.step(self.step + 1, PAIR_RATE * self._share_left)
            assert inputs.grad is not None
            gradient = inputs.grad
            del left  # whose graph has the pairs of this block
        entered, _ = passes.enter(self._outside(leaves))
        if entered.requires_grad:
            entered.backward(gradient)  # type: ignore[no-untyped-call]
        moved = [(outside[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
        tuned = [(tensor, grad) for tensor, grad in moved if tensor.requires_grad]
        torch.autograd.backward([tensor for tensor, _ in tuned], [grad for _, grad in tuned])
        self._optimizer.step()
        return loss

    def _outside(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**self._passes.dense_outside(), **leaves}

    def _of_block(self, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**weights, **self._student.tensors(self._passes.model.parameters[name])}

    def _head(self, leaves: Mapping[str, Tensor], dense: Tensor, hidden: Tensor) -> tuple[float, Tensor]:
        """Return the mean divergence, and its gradient at what the last block leaves; ``leaves`` get theirs."""
        passes, model = self._passes, self._passes.model
        total, gradient = 0.0, torch.zeros_like(hidden)
        outside, rows = model.read_outside(), model.stored.rows(model.head)
        moved_rows = None if model.head in leaves else rows
        for window, part in pieces(passes.windows, _LOGITS // self._vocabulary):
            ids = passes.windows[window : window + 1, part]
            with torch.no_grad():
                expected = model.leave(dense[window : window + 1, part], ids, outside, rows)[0].float().log_softmax(-1)
            leaf = hidden[window : window + 1, part].detach().requires_grad_()
            found = model.leave(leaf, ids, {**outside, **leaves}, moved_rows)[0].float().log_softmax(-1)
            loss = (expected.exp() * (expected - found)).sum() / self.step_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            assert leaf.grad is not None
            gradient[window : window + 1, part] = leaf.grad
        return total, gradient

    def _save(self) -> None:
        """Keep where the run is, if it is to be kept; a place without room is no error."""
        if self._state is None:
            return
        tensors = self._student.pairs.state()
        for name, move in self._student.moves.items():
            tensors[f"move {name}"] = move.detach()
            for key, value in self._optimizer.state[move].items():
                tensors[f"{key} {name}"] = value
        counters = {"step": self.step, "steps": self.steps, "seconds": self.seconds}
        if not try_to_write_state(self._state, self._identity, tensors, counters):
            self._state = None

    def _load(self, file: Path) -> None:
        """Put this run where the stored one was; one that is damaged, or of another plan, is left alone."""
        stored, counters = read_state(file, self._identity)
        if not counters:
            return
        parts = "step", "exp_avg", "exp_avg_sq"
        with torch.no_grad():
            for name, move in self._student.moves.items():
                move.copy_(stored[f"move {name}"])
                self._optimizer.state[move] = {part: stored[f"{part} {name}"] for part in parts}
        self._student.pairs.restore(stored)
        self.step, self.steps, self.seconds = counters["step"], counters["steps"], counters["seconds"]
