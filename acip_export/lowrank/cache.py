"""Keep singular components on disk, so that a second ranking or a new size of a model needs no SVD.

One safetensors file per weight, named by what went in: SHA-256 over the weight, the moments of its basis and the
damping. Ranking and materializing therefore share entries, and one of another model, basis or version is never found.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from acip_export.errors import CheckpointError, UsageError
from acip_export.finite import is_finite
from acip_export.io.atomic import new_file, read_safetensors_header
from acip_export.lowrank.components import Components, whitened_components
from acip_export.lowrank.whitening import DAMPING, Whitening

_VERSION = "3"


class FactorCache:
    """Keep factorized weights in a directory; ``None`` keeps nothing.

    Raises:
        UsageError: the directory cannot be made.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"{directory} is no place for a cache: {error}; give another  --cache") from error

    def components(self, weight: Tensor, right: Whitening | None, left: Whitening | None) -> Components:
        """Compute :func:`acip_export.lowrank.components.whitened_components` once; damaged entries again."""
        if self.directory is None:
            return whitened_components(weight, right, left)
        file = self.directory / f"{_key(weight, right, left)}.safetensors"
        known = _read(file, (weight.shape[0], weight.shape[1]))
        if known is None:
            from safetensors.torch import save_file

            known = whitened_components(weight, right, left)
            tensors = {"up": known.up, "down": known.down, "singular": known.singular}
            with new_file(file) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        return known


def _key(weight: Tensor, right: Whitening | None, left: Whitening | None) -> str:
    digest = hashlib.sha256(f"{_VERSION}|{DAMPING}|{tuple(weight.shape)}|".encode())
    digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    for whitening in (right, left):
        digest.update(b"|" if whitening is None else whitening.digest)
    return digest.hexdigest()


def _read(file: Path, shape: tuple[int, int]) -> Components | None:
    if not file.exists():
        return None
    from safetensors.torch import load_file

    rank = min(shape)
    expected = {"up": (shape[0], rank), "down": (rank, shape[1]), "singular": (rank,)}
    try:
        entries, _ = read_safetensors_header(file, CheckpointError)
    except CheckpointError:
        return None
    if {name: entry.shape for name, entry in entries.items()} != expected:
        return None
    tensors = load_file(file)
    if not all(map(is_finite, tensors.values())):
        return None
    return Components(tensors["up"], tensors["down"], tensors["singular"])
