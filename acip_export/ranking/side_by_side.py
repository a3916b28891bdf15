"""Work on several layers at a time, a thread each: products of small matrices gain little from more threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from acip_export.io.heap import give_back
from acip_export.machine import memory_bytes

# Of the machine's memory, what work side by side may take.
_SHARE = 0.5

_Result = TypeVar("_Result")


def layer_bytes(shape: tuple[int, int]) -> int:
    """Return what whitening and decomposing a layer (out, in) takes: moments of both sides, components, copies."""
    return 8 * (2 * sum(n * n for n in shape) + 6 * shape[0] * shape[1])


def at_once(each_bytes: int, threads: int) -> int:
    """Return how many layers are in memory at a time: one for each thread and one that waits, if there is room."""
    room = int(_SHARE * memory_bytes()) // max(1, each_bytes)
    return max(1, min(threads + 1, room))


def side_by_side(
    work: Callable[[str], _Result], names: Sequence[str], each_bytes: int = 0, ahead: bool = False
) -> Iterator[tuple[str, _Result]]:
    """Yield ``work`` of every name, in order; no more results wait at any time than torch has threads.

    Args:
        each_bytes: that the largest work takes. Where there is no room for two, one comes after the other, each with
            all threads.
        ahead: use a thread beside this one even if torch has but one, so that work goes on while this one waits.
    """
    threads = torch.get_num_threads()
    together = at_once(each_bytes, threads)
    if (threads == 1 or together == 1) and not ahead:
        for name in names:
            yield name, work(name)
        return
    workers = max(1, together - 1)
    waiting: deque[tuple[str, Future[_Result]]] = deque()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name in names:
                waiting.append((name, pool.submit(work, name)))
                if len(waiting) > workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
    finally:
        torch.set_num_threads(threads)  # what one thread sets, parts of torch take for all
        give_back()
