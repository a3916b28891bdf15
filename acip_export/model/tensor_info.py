"""Where a tensor of a model directory lies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: ``(out, in)`` for a linear weight.
        dtype: the safetensors name, for example ``BF16``.
        shard: file name below the model directory.
        offset, nbytes: position of the data in the shard.
        stored: its name there, if it is another one. transposed: it lies there as ``(in, out)``.
    """

    shape: tuple[int, ...]
    dtype: str
    shard: str
    offset: int
    nbytes: int
    stored: str | None = None
    transposed: bool = False
