"""Give memory that is free back to the system: what a stage has let go of is not there while the next one works."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import Any

# mallopt's parameters.
_TRIM_THRESHOLD, _MAP_THRESHOLD = -1, -3
# Bytes from which a block is a mapping of its own: for work on matrices, and else. By itself glibc goes up to twice
# that, a little more than logits have in bfloat16.
_APART, _USUAL = 1 << 20, 1 << 24
# Where users set the threshold themselves, it stays as they have set it.
_OWN_VARIABLE, _OWN_TUNABLE = "MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold"

_lock = Lock()
_inside = 0


def give_back() -> None:
    """Return the free pages of the heap to the system, where the C library can: glibc keeps the holes in its arenas."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Have each large block mapped for itself inside, so that it is the system's again as soon as it is freed.

    In a heap, matrices of different sizes leave holes for each other that none of them fits into: decomposing a layer
    took between 1.3 times and twice of what was in use. New pages cost work on matrices little, passes of texts more.

    It holds for the whole process until the last of those inside, in whatever thread, is done. Behind it the threshold
    is a fixed one: glibc cannot be told to adapt it again.
    """
    global _inside
    setting = None if _set_by_user() else _of_glibc("mallopt")
    if setting is None:
        yield
        return
    with _lock:
        _inside += 1
        setting(_MAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                setting(_MAP_THRESHOLD, _USUAL)
                setting(_TRIM_THRESHOLD, 2 * _USUAL)
        give_back()


def _set_by_user() -> bool:
    return _OWN_VARIABLE in os.environ or _OWN_TUNABLE in os.environ.get("GLIBC_TUNABLES", "")


@lru_cache
def _of_glibc(name: str) -> Callable[..., Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
