"""Keep hidden states in a file between two blocks of a model, so that a pass goes on where its process was killed.

Whatever else is measured step by step, and has few numbers to go on from, is kept in the same way.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.errors import InputError, OutputError
from acip_export.io.atomic import new_file, read_safetensors_header, remove_leftovers
from acip_export.io.interruptions import kept_if_interrupted

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# Seconds of passing that a process which is killed may lose, and how many times as long as writing they are at least.
_AT_MOST_LOST, _TIMES_WRITING = 20.0, 20.0


class KeptStates:
    """What has left a block, of one pass of texts through a model.

    Args:
        file: safetensors. origin: all that the states follow from; what is of another is not read.

    Attributes:
        blocks: that are behind, or steps of another kind; 0 without a file.
    """

    def __init__(self, file: Path, origin: str) -> None:
        self.file, self.blocks = file, 0
        self._origin = hashlib.sha256(origin.encode()).hexdigest()
        self._able, self._saved, self._took = True, time.monotonic(), 0.0
        self._restored = self._read()

    def restored(self) -> Mapping[str, Tensor]:
        """Return what an earlier process has kept, by name, once."""
        restored, self._restored = self._restored, {}
        return restored

    def passed(self, blocks: int, states: Mapping[str, Tensor]) -> None:
        """Note that so many blocks are behind. It is kept now and then; a place without room is no error."""
        begin = time.monotonic()
        if not self._able or begin - self._saved < max(_AT_MOST_LOST, _TIMES_WRITING * self._took):
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {name: tensor.contiguous() for name, tensor in states.items()}
        metadata = {"origin": self._origin, "blocks": str(blocks), "sha256": _digest(tensors)}
        try:
            with new_file(self.file) as temporary:
                save_file(tensors, temporary, metadata)
        except (OSError, OutputError, SafetensorError) as reason:
            logger.warning("%s is not kept (%s); a process that is killed starts again", self.file, reason)
            self._able = False
        self.blocks, self._saved = blocks, time.monotonic()
        self._took = self._saved - begin

    def _read(self) -> dict[str, Tensor]:
        if not self.file.is_file():
            return {}
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        with suppress(InputError, OSError, SafetensorError):
            _, metadata = read_safetensors_header(self.file, InputError)
            if metadata.get("origin") == self._origin:
                tensors: dict[str, Tensor] = load_file(self.file)
                # A power cut may leave a file without its content.
                if metadata.get("sha256") == _digest(tensors):
                    self.blocks = int(metadata["blocks"])
                    return tensors
        return {}


@contextmanager
def kept_states(file: Path, origin: str, step: str = "block") -> Iterator[KeptStates]:
    """Yield what a pass keeps in ``file``, which is gone when the block ends, unless it is interrupted.

    Args:
        step: what ``blocks`` counts.
    """
    kept = KeptStates(file, origin)
    if kept.blocks:
        logger.warning("going on behind %s %d, from what an earlier run has kept", step, kept.blocks)
    with kept_if_interrupted(file, partial(_remove, file), "how far it is stays in %s: the same command goes on"):
        yield kept


def _remove(file: Path) -> None:
    with suppress(OSError):  # a place that cannot be written to has none
        file.unlink(missing_ok=True)
        remove_leftovers(file)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
