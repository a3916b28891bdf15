"""Learn a ranking: masks and adapters in one stochastic gradient run (ACIP, arXiv 2502.01717, section 3).

Minimise, over masks p and adapters,  L(p, adapters) + w_t * sum |p|_1  by AdamW, with w_t growing step by step; the
order in which masks reach zero is the ranking. Then the adapters alone are tuned on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from acip_export.artifacts.scores import FloatArray
from acip_export.errors import RankingError
from acip_export.lowrank.order import GlobalOrder
from acip_export.progress import Clock, ProgressCallback, silent
from acip_export.ranking.config import AcipConfig
from acip_export.ranking.context import RankContext
from acip_export.ranking.data import WindowStream
from acip_export.ranking.masked_linear import MaskedLinear, live_ratio
from acip_export.ranking.objectives import task_loss
from acip_export.ranking.processes import check_batch
from acip_export.ranking.score_map import broken_ties, update_score_map

# Steps between moving pruned components out of the way; it costs a copy of the factors.
_DROP_EVERY = 8


class AcipRun:
    """The run as a state that is advanced step by step, so that it can be watched, stored and resumed.

    Attributes:
        layers: by module name. score_map: by module, by component (section 3.2). penalty: w_t, the current L1 weight.
        mask_steps, tune_steps: done so far. masks_done: the stop ratio is reached.
        interrupted: whether this process was asked to stop.
    """

    def __init__(
        self,
        context: RankContext,
        layers: Mapping[str, MaskedLinear],
        drop_losses: Mapping[str, npt.NDArray[np.float64]],
        config: AcipConfig,
    ) -> None:
        self.model, self.task, self.seed, self.processes = context.model, context.task, context.seed, context.processes
        self.layers, self.drop_losses, self.config = layers, drop_losses, config
        self.device = next(iter(layers.values())).mask.device
        self.stream = WindowStream(context.data.training, config.batch, self.seed)
        check_batch(self.stream.batch, self.processes.count)
        self.interrupted: Callable[[], int] = lambda: 0
        self._stopping = False
        self.sizes = np.random.default_rng(self.seed)
        if config.start == "drop-loss":
            self._grade_masks()
        self.score_map: dict[str, FloatArray] = {
            n: layer.mask.detach().cpu().numpy().copy() for n, layer in layers.items()
        }
        self.masks = [layer.mask for layer in layers.values()]
        # By stored mask, which is the mask times its scale.
        self._mask_losses = [
            torch.from_numpy(drop_losses[n] / config.mask_scale).to(layer.mask) for n, layer in layers.items()
        ]
        self.adapters = [p for layer in layers.values() if layer.adapted for p in (layer.adapter_a, layer.adapter_b)]
        for parameter in (*self.masks, *self.adapters):
            parameter.requires_grad_()
        self._adapter_rate = config.adapter_learning_rate or config.learning_rate
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.masks, "lr": config.learning_rate},
                {"params": self.adapters, "lr": self._adapter_rate},
            ],
            weight_decay=0.0,
        )
        self.penalty = config.penalty
        self.mask_steps = self.tune_steps = 0
        self.masks_done = False
        self._order: GlobalOrder | None = None

    def _grade_masks(self) -> None:
        joined = np.concatenate([self.drop_losses[name] for name in self.layers])
        ranks = np.empty(len(joined))
        ranks[np.argsort(joined, kind="stable")] = np.arange(1, len(joined) + 1) / len(joined)
        start = 0
        for layer in self.layers.values():
            count = len(layer.mask)
            grade = torch.from_numpy(ranks[start : start + count]).to(layer.mask)
            layer.mask.data.copy_(layer.mask_scale * grade)
            start += count

    def mask_step(self) -> float:
        """Take one step of masks and adapters, and return the task loss.

        Raises:
            RankingError: the loss is not finite.
        """
        loss = self._loss(next(self.stream))
        before = [mask.detach() > 0 for mask in self.masks]
        task = self._update(loss, self._penalize)
        self._stay_at_stop_ratio(before)
        self.mask_steps += 1
        for name, layer in self.layers.items():
            self.score_map[name] = update_score_map(self.score_map[name], layer.mask.detach().cpu().numpy())
        if self.mask_steps % self.config.penalty_every == 0:
            self.penalty *= self.config.penalty_growth
        if self.mask_steps % _DROP_EVERY == 0:
            for layer in self.layers.values():
                layer.drop_pruned()
        self.masks_done = self.ratio() <= self.config.stop_ratio or self.mask_steps >= self.config.max_steps
        return task

    def tune_step(self) -> float:
        """Take one step of the adapters alone, at the stop ratio or at one drawn for it; return the task loss."""
        self._choose_size()
        if self.config.post_tune_decay:
            left = 1 - self.tune_steps / self.config.post_tune
            self.optimizer.param_groups[1]["lr"] = left * self._adapter_rate
        loss = self._loss(next(self.stream))
        task = self._update(loss)
        self.tune_steps += 1
        return task

    def should_stop(self) -> bool:
        """Tell whether any process was asked to stop; of several, all say the same, as of the last step."""
        return self._stopping or (self.processes.count == 1 and self.interrupted() != 0)

    def ratio(self) -> float:
        return live_ratio(self.layers)

    def scores(self) -> dict[str, FloatArray]:
        """Return the final scores by module, by component."""
        if self.config.tie_break == "index":
            return {n: np.where(s > 0, s, s - 1).astype(np.float32) for n, s in self.score_map.items()}
        return broken_ties(self.score_map, self.drop_losses)

    def counters(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs beside :meth:`tensors`, as plain JSON."""
        return {
            "mask_steps": self.mask_steps,
            "tune_steps": self.tune_steps,
            "masks_done": self.masks_done,
            "penalty": self.penalty,
            "position": self.stream.position,
            "sizes": self.sizes.bit_generator.state,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return masks, adapters, their optimizer's state, score map and arrangement, by name."""
        state = {
            f"optimizer/{index}/{key}": value
            for index, parameter in enumerate((*self.masks, *self.adapters))
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        for name, layer in self.layers.items():
            state[f"mask/{name}"] = layer.mask.detach()
            state[f"a/{name}"], state[f"b/{name}"] = layer.adapter_a.detach(), layer.adapter_b.detach()
            state[f"score_map/{name}"] = torch.from_numpy(self.score_map[name])
            state[f"arrangement/{name}"] = layer.arrangement
            state[f"live/{name}"] = torch.tensor([layer.live])
        return state

    def restore(self, counters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue where :meth:`counters` and :meth:`tensors` were taken."""
        self.mask_steps, self.tune_steps = counters["mask_steps"], counters["tune_steps"]
        self.masks_done, self.penalty = counters["masks_done"], counters["penalty"]
        self.stream.position = counters["position"]
        self.sizes.bit_generator.state = counters["sizes"]
        for name, layer in self.layers.items():
            layer.mask.data.copy_(tensors[f"mask/{name}"])
            layer.adapter_a.data.copy_(tensors[f"a/{name}"])
            layer.adapter_b.data.copy_(tensors[f"b/{name}"])
            self.score_map[name] = tensors[f"score_map/{name}"].numpy()
            layer.arrange(tensors[f"arrangement/{name}"].to(self.device), int(tensors[f"live/{name}"]))
        for index, parameter in enumerate((*self.masks, *self.adapters)):
            if f"optimizer/{index}/step" in tensors:
                self.optimizer.state[parameter] = {
                    key: tensors[f"optimizer/{index}/{key}"].to("cpu" if key == "step" else self.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def _choose_size(self) -> None:
        if self._order is None:
            scores = self.scores()
            shapes = {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}
            self._order = GlobalOrder(scores, shapes)
            for name, layer in self.layers.items():
                layer.mask.requires_grad_(False)
                order = torch.from_numpy(np.argsort(-scores[name], kind="stable")).to(self.device)
                layer.arrange(order, int((layer.mask > 0).sum()))
                layer.gated = False
            self.optimizer.param_groups[0]["params"] = []
        if self.config.post_tune_sizes == "sampled":
            smallest = self.config.smallest_sampled or self.config.stop_ratio
            ranks = self._order.ranks_at(self.sizes.uniform(smallest, self.config.largest_sampled))
            for name, layer in self.layers.items():
                layer.live = len(layer.mask) if self._order.stays_dense(name, ranks[name]) else ranks[name]

    @torch.no_grad()
    def _stay_at_stop_ratio(self, before: list[Tensor]) -> None:
        """Let a last step that prunes past the stop ratio prune only those with the smallest predicted losses.

        Masks that the loss does not tell apart cross zero together; a run whose steps are too long for its order could
        otherwise end with nothing left.
        """
        if self.ratio() >= self.config.stop_ratio or self.config.tie_break == "index":
            return
        pruned = torch.cat([was & (mask <= 0) for was, mask in zip(before, self.masks, strict=True)]).nonzero()[:, 0]
        losses = torch.from_numpy(np.concatenate([self.drop_losses[name] for name in self.layers]))
        # From the one that is missed most; each a little above the next, far below any mask that is still moving.
        missed = pruned[losses.to(self.device)[pruned].argsort(descending=True, stable=True)]
        values = torch.linspace(2, 1, len(missed)).to(self.masks[0]) * 1e-6 * self.config.mask_scale
        stopped = torch.cat([mask.detach().clone() for mask in self.masks])

        def restore(count: int) -> float:
            masks = stopped.index_copy(0, missed[:count], values[:count])
            for mask, part in zip(self.masks, masks.split([len(mask) for mask in self.masks]), strict=True):  # type: ignore[no-untyped-call]
                mask.copy_(part)
            return self.ratio()

        fits, too_many = 0, len(missed) + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if restore(middle) <= self.config.stop_ratio else (fits, middle)
        restore(fits)

    @torch.no_grad()
    def check(self) -> None:
        """Measure a loss of the present state: what is stored is then known to be good.

        Raises:
            RankingError: it is not finite.
        """
        position = self.stream.position
        loss = self._loss(next(self.stream))
        self.stream.position = position
        self._require_finite(float(self.processes.sum(loss.double())))

    def _loss(self, batch: Tensor) -> Tensor:
        self.model.train()
        step = self.mask_steps + self.tune_steps
        # Everything random in a step follows from its number: nothing to store, and each process drops out otherwise.
        torch.manual_seed(((self.seed << 40) + (step << 10) + self.processes.index) % 2**63)
        windows = batch[self.processes.index :: self.processes.count]
        loss = task_loss(self.task, self.config.objective, self.model, self.layers, windows.to(self.device))
        # Means over shares with different numbers of masked tokens: so weighted, their mean is that of the batch.
        return loss * (self.processes.count * self.task.counted(windows) / self.task.counted(batch))

    @torch.no_grad()
    def _penalize(self) -> None:
        """Turn the task's gradients of the masks into the objective's."""
        for mask, loss in zip(self.masks, self._mask_losses, strict=True):
            assert mask.grad is not None
            if self.config.second_order:
                # Dropping changes the loss by -g + d (g: gradient at one, d: predicted loss), so g - d is what a mask
                # on its way to zero meets on average. Where that is no gain, g > 0 is no reason to go there.
                down = mask.grad.clamp_min(0)
                mask.grad += (down - loss).clamp_min_(0) - down
            mask.grad += self.penalty * (mask > 0)

    def _update(self, loss: Tensor, adjust: Callable[[], None] = lambda: None) -> float:
        """Take one optimizer step on the mean over all processes, whose gradients ``adjust`` may change.

        Returns:
            The mean of ``loss``.
        """
        loss.backward()  # type: ignore[no-untyped-call]
        mean, self._stopping = self._average(float(loss.detach()))
        self._require_finite(mean)
        adjust()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def _average(self, loss: float) -> tuple[float, bool]:
        """Average gradients and loss, and learn whether any process was interrupted, in one message."""
        if self.processes.count == 1:
            return loss, False
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        news = torch.tensor([loss, float(self.interrupted() != 0)], device=self.device)
        message = self.processes.sum(torch.cat([*(gradient.flatten() for gradient in gradients), news]))
        message[:-1] /= self.processes.count
        begin = 0
        for gradient in gradients:
            gradient.copy_(message[begin : begin + gradient.numel()].view_as(gradient))
            begin += gradient.numel()
        return float(message[-2]), bool(message[-1] > 0)

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise RankingError(
                f"the loss is {loss} at step {self.mask_steps + self.tune_steps + 1}; expected a finite number.\n"
                f"Lower the learning rate (now {self.config.learning_rate:g})"
            )


def advance(run: AcipRun, context: int, progress: ProgressCallback = silent) -> Iterator[None]:
    """Run to the end, and yield after every step, when the state is whole."""
    tokens = run.stream.batch * context
    clock = Clock("masks", None, progress, tokens, done=run.mask_steps, share=_share_of_masks(run))
    while not run.masks_done:
        loss = run.mask_step()
        clock.advance(ratio=run.ratio(), loss=loss, share=_share_of_masks(run))
        yield
    ratio = run.ratio()
    clock = Clock("post-tune", run.config.post_tune, progress, tokens, done=run.tune_steps)
    while run.tune_steps < run.config.post_tune and run.adapters:
        loss = run.tune_step()
        clock.advance(ratio=ratio, loss=loss)
        yield
    run.model.eval()


def _share_of_masks(run: AcipRun) -> float:
    """Return the share of the mask steps that is behind: by size, or by how far the average mask has come."""
    left = torch.cat([mask.detach().relu() for mask in run.masks]).mean().item() / run.config.mask_scale
    return min(1.0, max(1 - left, (1 - run.ratio()) / (1 - run.config.stop_ratio)))
