"""The paper's equations (arXiv 2502.01717, section 3), written down as plainly as they can be, for one model at a time.

Weights are rebuilt in full for every step, W = U diag(m) S V^T + (alpha / r) B A, and Adam is written out. Slow, and
meant to share nothing with the real implementation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call


class PlainAcip:
    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        adapters: dict[str, Tensor],
        scale: float,
        alpha: float,
        learning_rate: float,
    ) -> None:
        self.model, self.scale, self.learning_rate = model, scale, learning_rate
        self.factors = {
            name: torch.linalg.svd(model.get_parameter(f"{name}.weight"), full_matrices=False) for name in names
        }
        self.p = {name: torch.full_like(s, scale) for name, (_, s, _) in self.factors.items()}
        self.a = {name: a.clone() for name, a in adapters.items()}
        self.b = {
            name: a.new_zeros(model.get_parameter(f"{name}.weight").shape[0], len(a)) for name, a in adapters.items()
        }
        self.alpha = alpha
        self.score_map = {name: p.clone() for name, p in self.p.items()}
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}
        self.weight, self.steps = 1e-3, 0

    def step(self, windows: Tensor) -> float:
        leaves = [*self._leaves()]
        for leaf in leaves:
            leaf.requires_grad_()
        weights = {}
        for name, (u, s, vt) in self.factors.items():
            p = torch.relu(self.p[name])
            m = (p > 0).to(p) + p / self.scale - (p / self.scale).detach()
            weights[f"{name}.weight"] = (
                u @ torch.diag(m * s) @ vt + self.alpha / len(self.a[name]) * self.b[name] @ self.a[name]
            )
        logits = functional_call(self.model, weights, kwargs={"input_ids": windows}).logits[:, :-1]
        task = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).mean()
        l1 = sum(torch.relu(p).sum() for p in self.p.values())
        gradients = torch.autograd.grad(task + self.weight * l1, leaves)
        self.steps += 1
        for index, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            leaf.requires_grad_(False)
            first, second = self.moments.get(index, (torch.zeros_like(leaf), torch.zeros_like(leaf)))
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            self.moments[index] = first, second
            corrected = first / (1 - 0.9**self.steps), second / (1 - 0.999**self.steps)
            leaf -= self.learning_rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
        if self.steps % 4 == 0:
            self.weight *= 1.01
        for name, p in self.p.items():
            for i in range(len(p)):
                if p[i] > 0:
                    self.score_map[name][i] = p[i]
                elif self.score_map[name][i] > 0:
                    self.score_map[name][i] = 0
                else:
                    self.score_map[name][i] -= 1
        return task.item()

    def _leaves(self) -> Iterator[Tensor]:
        for tensors in (self.p, self.a, self.b):
            yield from tensors.values()
