"""Keep second moments, and the samples that they are sums of, in scratch files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import cast

import numpy as np
from torch import Tensor

from acip_export.artifacts.scores import FloatArray
from acip_export.io.scratch import Scratch
from acip_export.lowrank.moments import PackedMoment, moment_name, pack_gradients, pack_moment
from acip_export.lowrank.whitening import Whitening
from acip_export.ranking.layer_memory import gradient_packing_bytes, packing_bytes
from acip_export.ranking.side_by_side import side_by_side
from acip_export.ranking.stored_tensors import StoredTensors

_DIAGONAL = "/diagonal"


class StoredMoments(Mapping[str, Tensor]):
    """Hold second moments in a scratch file as the score file stores them, so that one of them is in memory at a time.

    Whoever factorizes from the score file finds the same components therefore.

    Args:
        weight_of: gives the weight whose output gradients a moment is of; ``None``: the moments are of inputs.
    """

    def __init__(self, scratch: Scratch, weight_of: Callable[[str], Tensor] | None = None) -> None:
        self._scratch, self._weight_of = scratch, weight_of
        stored = [name for name in scratch if name.endswith(_DIAGONAL)]
        self._diagonals: dict[str, FloatArray] = {name.removesuffix(_DIAGONAL): scratch.read(name) for name in stored}

    def store(self, moments: Mapping[str, Tensor]) -> None:
        """Keep symmetric matrices, of which the upper triangles are looked at.

        Raises:
            ScoreFileError: see :func:`pack_moment`.
        """

        def pack(key: str) -> PackedMoment:
            name = moment_name(key)
            if self._weight_of is None:
                return pack_moment(moments[key], name)
            return pack_gradients(moments[key], self._weight_of(key), name)

        largest = max((self._packing_bytes(key, len(moment)) for key, moment in moments.items()), default=0)
        with closing(side_by_side(pack, list(moments), largest)) as in_order:
            for key, packed in in_order:
                self._diagonals[key] = moments[key].diagonal().float().clamp_min(0).cpu().numpy()
                self._scratch.write(f"{key}{_DIAGONAL}", self._diagonals[key])
                self._scratch.write(f"{key}/rows", packed.rows)
                self._scratch.write(f"{key}/codes", packed.codes)

    def _packing_bytes(self, key: str, columns: int) -> int:
        if self._weight_of is None:
            return packing_bytes(columns)
        out, inputs = self._weight_of(key).shape
        return gradient_packing_bytes((out, inputs))

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


class Samples:
    """Keep inputs and output gradients of linear layers, token by token and batch by batch, in a scratch file.

    In bfloat16: they go into sums of thousands, whose sampling error is far larger.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._stored = StoredTensors(scratch)
        self._counts = Counter(name.rpartition("/")[0] for name in scratch)

    def add(self, key: str, rows: Tensor) -> None:
        """Keep (n, length, width) of one batch."""
        self._stored[f"{key}/{self._counts[key]}"] = rows.detach().bfloat16()
        self._counts[key] += 1

    def of(self, key: str) -> Iterator[Tensor]:
        """Read what was kept, batch by batch, in float32."""
        for number in range(self._counts[key]):
            yield self._stored[f"{key}/{number}"].float()
