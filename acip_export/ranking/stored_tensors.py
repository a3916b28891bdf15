"""Keep tensors in a scratch file, by name."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from acip_export.io.scratch import Scratch


class StoredTensors:
    """Store tensors, and read fresh copies on the CPU.

    numpy has no bfloat16: it is stored as integers of two bytes, of which there are no others here.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        self._scratch.write(name, (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy())

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.from_numpy(self._scratch.read(name))
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor

    def __contains__(self, name: str) -> bool:
        return name in self._scratch

    def __iter__(self) -> Iterator[str]:
        return iter(self._scratch)
