"""One step ahead: the next result is computed while the one before is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def one_ahead(compute: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[tuple[_In, _Out]]:
    """``(item, compute(item))`` in order; while the caller has one, a thread computes the next.

    Two results exist at a time, never more. An exception of ``compute`` is raised where its item is due. A caller that
    stops early waits for the computation under way, and none begins behind it.
    """
    thread = ThreadPoolExecutor(1)
    waiting: tuple[_In, Future[_Out]] | None = None
    try:
        for item in items:
            following = (item, thread.submit(compute, item))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
            del following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
    finally:
        thread.shutdown(cancel_futures=True)
