"""Keep tensors in a scratch file, by name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from acip_export.io.scratch import Scratch


class StoredTensors:
    """Store tensors as bytes, as numpy has no bfloat16, and read fresh copies on the CPU."""

    def __init__(self, directory: Path | None = None) -> None:
        self._scratch = Scratch(directory)
        self._kinds: dict[str, tuple[torch.dtype, torch.Size]] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._kinds[name] = tensor.dtype, tensor.shape
        self._scratch.write(name, tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self._kinds[name]
        return torch.from_numpy(self._scratch.read(name)).view(dtype).view(shape)

    def __contains__(self, name: str) -> bool:
        return name in self._kinds

    def close(self) -> None:
        """Give the room back."""
        self._scratch.close()
