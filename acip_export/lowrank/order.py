"""Order all components of a model, and derive the ranks that follow for any size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from acip_export.model.tensor_names import natural_key

FloatArray = npt.NDArray[np.float32]


class GlobalOrder:
    """Order all components from least to most important: by score, then module, then index (a total order).

    Attributes:
        names: modules in natural order. counts: (modules,) components of each.
        positions: (n,) the order, as positions in the concatenation of the modules' arrays.
        owners: (n,) module number of each component along the order.
    """

    def __init__(self, scores: Mapping[str, FloatArray], shapes: Mapping[str, tuple[int, int]]) -> None:
        self.names = sorted(scores, key=natural_key)
        self.shapes = shapes
        self.counts = np.array([len(scores[name]) for name in self.names])
        joined = np.concatenate([scores[name] for name in self.names])
        self.positions = np.argsort(joined, kind="stable")
        self.owners = np.repeat(np.arange(len(self.counts)), self.counts)[self.positions]
        sizes = [shapes[name][0] * shapes[name][1] for name in self.names]
        freed = np.empty(len(self.owners), np.int64)
        # Along the order, a module's components go from its full rank to none.
        freed[np.argsort(self.owners, kind="stable")] = np.concatenate(
            [
                -np.diff(np.minimum(np.arange(count, -1, -1) * sum(shapes[name]), size))
                for name, count, size in zip(self.names, self.counts, sizes, strict=True)
            ]
        )
        self.total = sum(sizes)
        self.present = self.total - np.concatenate([[0], np.cumsum(freed)])

    def ranks_at(self, ratio: float) -> dict[str, int]:
        """Return the rank of every module when the linear layers keep at most ``ratio`` of their parameters.

        A module of shape (m, n) and rank r counts min(r*(m+n), m*n): a pair that would be larger stays dense.
        """
        dropped = int(np.argmax(self.present <= ratio * self.total))
        kept = self.counts - np.bincount(self.owners[:dropped], minlength=len(self.counts))
        return {name: int(rank) for name, rank in zip(self.names, kept, strict=True)}

    def stays_dense(self, name: str, rank: int) -> bool:
        """Tell whether the pair would be no smaller than the dense weight."""
        out, inputs = self.shapes[name]
        return rank * (out + inputs) >= out * inputs
