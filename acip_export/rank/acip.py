"""The learned ranking: masks and adapters in one stochastic gradient run (ACIP, arXiv 2502.01717, section 3).

Minimise, over masks p and adapters,  L(p, adapters) + w_t * sum |p|_1  by AdamW, with w_t growing step by step; the
order in which masks reach zero is the ranking. Then the adapters alone are tuned on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from acip_export.errors import RankingError
from acip_export.global_order import GlobalOrder
from acip_export.rank.config import AcipConfig, ProgressCallback, silent
from acip_export.rank.data import WindowStream
from acip_export.rank.objectives import task_loss
from acip_export.rank.ordering import broken_ties, update_score_map
from acip_export.rank.parametrize import MaskedLinear, live_ratio
from acip_export.rank.tasks import CAUSAL, Task
from acip_export.rank.timing import Clock
from acip_export.scores import FloatArray

# Steps between moving pruned components out of the way; it costs a copy of the factors.
_DROP_EVERY = 8


class AcipRun:
    """The run as a state that is advanced step by step, so that it can be watched, stored and resumed.

    Attributes:
        layers: by module name. score_map: by module, by component (section 3.2). penalty: w_t, the current L1 weight.
        mask_steps, tune_steps: done so far. masks_done: the stop ratio is reached.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, MaskedLinear],
        drop_losses: Mapping[str, npt.NDArray[np.float64]],
        windows: Tensor,
        config: AcipConfig,
        seed: int,
        task: Task = CAUSAL,
    ) -> None:
        self.task = task
        self.model, self.layers, self.drop_losses, self.config = model, layers, drop_losses, config
        self.device = next(iter(layers.values())).mask.device
        self.stream = WindowStream(windows, config.batch, seed)
        self.sizes = np.random.default_rng(seed)
        if config.start == "drop-loss":
            self._grade_masks()
        self.score_map: dict[str, FloatArray] = {
            n: layer.mask.detach().cpu().numpy().copy() for n, layer in layers.items()
        }
        self.masks = [layer.mask for layer in layers.values()]
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
            grade = torch.from_numpy(ranks[start : start + count]).float().to(self.device)
            layer.mask.data.copy_(layer.mask_scale * grade)
            start += count

    def mask_step(self) -> float:
        """One step of masks and adapters; returns the task loss.

        Raises:
            RankingError: the loss is not finite.
        """
        loss = self._loss()
        norm = torch.stack([mask.relu().sum() for mask in self.masks]).sum()
        self._update(loss + self.penalty * norm)
        self.mask_steps += 1
        for name, layer in self.layers.items():
            self.score_map[name] = update_score_map(self.score_map[name], layer.mask.detach().cpu().numpy())
        if self.mask_steps % self.config.penalty_every == 0:
            self.penalty *= self.config.penalty_growth
        if self.mask_steps % _DROP_EVERY == 0:
            for layer in self.layers.values():
                layer.drop_pruned()
        self.masks_done = self.ratio() <= self.config.stop_ratio or self.mask_steps >= self.config.max_steps
        return loss.item()

    def tune_step(self) -> float:
        """One step of the adapters alone, at the stop ratio or at one drawn for this step; returns the task loss."""
        self._choose_size()
        if self.config.post_tune_decay:
            left = 1 - self.tune_steps / self.config.post_tune
            self.optimizer.param_groups[1]["lr"] = left * self._adapter_rate
        loss = self._loss()
        self._update(loss)
        self.tune_steps += 1
        return loss.item()

    def ratio(self) -> float:
        return live_ratio(self.layers)

    def scores(self) -> dict[str, FloatArray]:
        """Final scores by module, by component."""
        if self.config.tie_break == "index":
            return {n: np.where(s > 0, s, s - 1).astype(np.float32) for n, s in self.score_map.items()}
        return broken_ties(self.score_map, self.drop_losses)

    def counters(self) -> dict[str, Any]:
        """What :meth:`restore` needs beside :meth:`tensors`; plain JSON."""
        return {
            "mask_steps": self.mask_steps,
            "tune_steps": self.tune_steps,
            "masks_done": self.masks_done,
            "penalty": self.penalty,
            "position": self.stream.position,
            "sizes": self.sizes.bit_generator.state,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Masks, adapters, score map and arrangement, by name."""
        found = {}
        for name, layer in self.layers.items():
            found[f"mask/{name}"] = layer.mask.detach()
            found[f"a/{name}"], found[f"b/{name}"] = layer.adapter_a.detach(), layer.adapter_b.detach()
            found[f"score_map/{name}"] = torch.from_numpy(self.score_map[name])
            found[f"arrangement/{name}"] = layer.arrangement
            found[f"live/{name}"] = torch.tensor([layer.live])
        return found

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
            ranks = self._order.ranks_at(self.sizes.uniform(self.config.stop_ratio, 1.0))
            for name, layer in self.layers.items():
                layer.live = len(layer.mask) if self._order.stays_dense(name, ranks[name]) else ranks[name]

    def _loss(self) -> Tensor:
        self.model.train()
        loss = task_loss(self.task, self.config.objective, self.model, self.layers, next(self.stream).to(self.device))
        if not torch.isfinite(loss):
            step = self.mask_steps + self.tune_steps + 1
            raise RankingError(
                f"the loss is {loss.item()} at step {step}; expected a finite number.\n"
                f"Lower the learning rate (now {self.config.learning_rate:g})"
            )
        return loss

    def _update(self, objective: Tensor) -> None:
        objective.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def advance(run: AcipRun, context: int, progress: ProgressCallback = silent) -> Iterator[None]:
    """Run to the end; yields after every step, when the state is whole."""
    tokens = run.stream.batch * context
    clock = Clock("masks", None, tokens, progress, run.mask_steps)
    while not run.masks_done:
        loss = run.mask_step()
        clock.advance(ratio=run.ratio(), loss=loss, done=_mask_progress(run))
        yield
    ratio = run.ratio()
    clock = Clock("post-tune", run.config.post_tune, tokens, progress, run.tune_steps)
    while run.tune_steps < run.config.post_tune and run.adapters:
        loss = run.tune_step()
        clock.advance(ratio=ratio, loss=loss)
        yield
    run.model.eval()


def _mask_progress(run: AcipRun) -> float:
    """Share of the mask phase that is behind: by size, or by how far the average mask has come."""
    left = torch.cat([mask.detach().relu() for mask in run.masks]).mean().item() / run.config.mask_scale
    return min(1.0, max(1 - left, (1 - run.ratio()) / (1 - run.config.stop_ratio)))
