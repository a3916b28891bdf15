"""Turn running out of memory into an error that says what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from acip_export.errors import RankingError

# How torch's CPU allocator says it, and the system where a file has no room; both raise a plain RuntimeError.
_CPU_WORDS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
)


@contextmanager
def out_of_memory_named(advice: str) -> Iterator[None]:
    """Turn any out-of-memory error inside into a RankingError that ends with ``advice``."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RankingError(_message(error, advice)) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _CPU_WORDS):
            raise
        raise RankingError(_message(error, advice)) from error


def _message(error: BaseException, advice: str) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"out of memory{': ' if reason else ''}{reason}\n{advice}"
