"""Keep hidden states in a file between two blocks of a model, so that a pass goes on where its process was killed.

Whatever else is measured step by step, and has few numbers to go on from, is kept in the same way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acip_export.errors import InputError, OutputError
from acip_export.io.atomic import new_file, read_safetensors_header
from acip_export.io.kept_until_done import kept_if_interrupted

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
        self.file = file
        self._origin, self._able, self._saved, self._took = origin, True, time.monotonic(), 0.0
        self._restored, facts = read_state(file, origin)
        self.blocks = facts.get("blocks", 0)

    def restored(self) -> Mapping[str, Tensor]:
        """Return what an earlier process has kept, by name, once."""
        restored, self._restored = self._restored, {}
        return restored

    def passed(self, blocks: int, states: Mapping[str, Tensor]) -> None:
        """Note that so many blocks are behind. It is kept now and then; a place without room is no error."""
        begin = time.monotonic()
        if not self._able or begin - self._saved < max(_AT_MOST_LOST, _TIMES_WRITING * self._took):
            return
        self._able = try_to_write_state(self.file, self._origin, states, {"blocks": blocks})
        self.blocks, self._saved = blocks, time.monotonic()
        self._took = self._saved - begin


@contextmanager
def kept_states(file: Path, origin: str, step: str = "block") -> Iterator[KeptStates]:
    """Yield what a pass keeps in ``file``, which is gone when the block ends, unless it is interrupted.

    Args:
        step: what ``blocks`` counts.
    """
    kept = KeptStates(file, origin)
    if kept.blocks:
        logger.warning("going on behind %s %d, from what an earlier run has kept", step, kept.blocks)
    with kept_if_interrupted(file, "how far it is"):
        yield kept


def states_beside(cache: Path | None, origin: str, step: str = "block") -> AbstractContextManager[KeptStates | None]:
    """Return :func:`kept_states` of what fills a cache; where there is none, nothing is kept."""
    return nullcontext() if cache is None else kept_states(cache.with_name(f"{cache.name}.run"), origin, step)


def write_state(file: Path, origin: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, and plain JSON beside them, whole or not at all. Raises OutputError where there is no place."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"origin": _sha256(origin), "facts": json.dumps(facts), "sha256": tensors_sha256(tensors)}
    with new_file(file) as temporary:
        save_file(tensors, temporary, metadata)


def try_to_write_state(file: Path, origin: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bool:
    """Write as :func:`write_state`; where there is no room, say so and return ``False``: it is no error."""
    from safetensors import SafetensorError

    try:
        write_state(file, origin, tensors, facts)
    except (OSError, OutputError, SafetensorError) as reason:
        logger.warning("%s is not kept (%s); a process that is killed starts again", file, reason)
        return False
    return True


def read_state(file: Path, origin: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what :func:`write_state` has written; nothing where it is not there, not whole or of another origin."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with suppress(InputError, OSError, SafetensorError):
        metadata = read_safetensors_header(file, InputError)[1] if file.is_file() else {}
        if metadata.get("origin") == _sha256(origin):
            tensors: dict[str, Tensor] = load_file(file)
            # A power cut may leave a file without its content.
            if metadata.get("sha256") == tensors_sha256(tensors):
                return tensors, json.loads(metadata.get("facts", "{}"))
    return {}, {}


def _sha256(origin: str) -> str:
    return hashlib.sha256(origin.encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return what tells tensors apart, names, shapes and dtypes included."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
