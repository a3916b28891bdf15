"""Work on several layers at a time, a thread each: products of small matrices gain little from more threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from acip_export.io.heap import give_back

_Result = TypeVar("_Result")


def side_by_side(
    work: Callable[[str], _Result], names: Sequence[str], ahead: bool = False
) -> Iterator[tuple[str, _Result]]:
    """Yield ``work`` of every name, in order; no more results wait at any time than torch has threads.

    Args:
        ahead: use a thread beside this one even if torch has but one, so that work goes on while this one waits.
    """
    threads = torch.get_num_threads()
    if threads == 1 and not ahead:
        for name in names:
            yield name, work(name)
        return
    waiting: deque[tuple[str, Future[_Result]]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name in names:
                waiting.append((name, pool.submit(work, name)))
                if len(waiting) > threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
    finally:
        torch.set_num_threads(threads)  # what one thread sets, parts of torch take for all
        give_back()
