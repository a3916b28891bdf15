"""Work on several layers at a time, a thread each: products of small matrices gain little from more threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

from acip_export.io.heap import large_blocks_apart
from acip_export.machine import memory_bytes

# Of the machine's memory, what work side by side may take.
_SHARE = 0.5

_Result = TypeVar("_Result")


def at_once(each_bytes: int, threads: int) -> int:
    """Return how many layers are worked on at a time: one for each thread, if there is room."""
    room = int(_SHARE * memory_bytes()) // max(1, each_bytes)
    return max(1, min(threads, room))


def side_by_side(
    work: Callable[[str], _Result], names: Sequence[str], each_bytes: int = 0, ahead: bool = False
) -> Generator[tuple[str, _Result], None, None]:
    """Yield ``work`` of every name, in order; no more results wait at any time than torch has threads.

    Where an exception or Ctrl-C ends it, or whoever asks closes it, only the work that has begun is still waited for.

    Args:
        each_bytes: that the largest work takes. Where there is no room for two, one comes after the other, each with
            all threads.
        ahead: use a thread beside this one even if torch has but one, so that work goes on while this one waits.
    """
    threads = torch.get_num_threads()
    workers = at_once(each_bytes, threads)
    if workers == 1 and not ahead:
        with large_blocks_apart():
            for name in names:
                yield name, work(name)
        return
    waiting: deque[tuple[str, Future[_Result]]] = deque()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)  # what one thread sets, parts of torch take for all
        stack.enter_context(large_blocks_apart())
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        stack.callback(pool.shutdown, cancel_futures=True)
        for name in names:
            waiting.append((name, pool.submit(work, name)))
            if len(waiting) > workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
