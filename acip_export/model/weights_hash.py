"""The hash of all weights of a model directory, remembered for as long as its files stay as they are."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from acip_export.errors import CheckpointError
from acip_export.io.atomic import keep, user_cache
from acip_export.model.tensor_info import TensorInfo

logger = logging.getLogger(__name__)

# Read at once by each thread.
_PIECE = 1 << 22
_THREADS = 4
# A file that was written this short before may be written again without another time.
_SETTLED_NS = 2 * 10**9
_SHA256 = re.compile(r"[0-9a-f]{64}")


def weights_sha256(directory: Path, tensors: Mapping[str, TensorInfo]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all tensors, however they lie in files.

    The user's cache remembers it under what the system says of the files: size, times and inode.

    Raises:
        CheckpointError: a file cannot be read.
    """
    key = hashlib.sha256("".join(f"{name}|{info}\n" for name, info in sorted(tensors.items())).encode())
    newest = 0
    for shard in sorted({info.shard for info in tensors.values()}):
        file = directory / shard
        try:
            found = file.stat()
        except OSError as reason:
            raise CheckpointError(f"{file} cannot be read: {reason.strerror}") from reason
        # More than a stamp: it is remembered for months, over all disks, and who writes a file can set its time.
        times = found.st_mtime_ns, found.st_ctime_ns
        newest = max(newest, *times)
        key.update(f"{os.path.realpath(file)}|{found.st_size}|{times}|{found.st_dev}|{found.st_ino}\n".encode())
    entry = user_cache() / "weights" / key.hexdigest()
    known = _read(entry)
    if known is None:
        known = _computed(directory, tensors)
        if time.time_ns() - newest > _SETTLED_NS:
            keep(entry, known.encode(), "hashed")
    return known


def _read(entry: Path) -> str | None:
    try:
        text = entry.read_bytes()[:100].decode("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text if _SHA256.fullmatch(text) else None


def _computed(directory: Path, tensors: Mapping[str, TensorInfo]) -> str:
    def of(info: TensorInfo) -> str:
        file, digest, left = directory / info.shard, hashlib.sha256(), info.nbytes
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(info.offset)
                while left:
                    piece = stream.read(min(left, _PIECE))
                    if not piece:
                        raise CheckpointError(f"{file} was cut short while it was read")
                    digest.update(piece)
                    left -= len(piece)
        except OSError as reason:
            raise CheckpointError(f"{file} cannot be read: {reason.strerror}") from reason
        return digest.hexdigest()

    names = sorted(tensors)
    whole = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, digest in zip(names, pool.map(of, (tensors[name] for name in names)), strict=True):
            whole.update(f"{name}|{tensors[name].dtype}|{tensors[name].shape}|{digest}\n".encode())
    return whole.hexdigest()
