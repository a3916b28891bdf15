"""Work ahead: the next results are computed while the one before is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

_In = TypeVar("_In")
_Between = TypeVar("_Between")
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


def some_ahead(
    prepare: Callable[[_In], _Between],
    finish: Callable[[_Between], _Out],
    items: Iterable[_In],
    workers: int,
    most: int,
    begin_preparing: Callable[[], None],
    begin_finishing: Callable[[], None],
) -> Iterator[tuple[_In, _Out]]:
    """``(item, finish(prepare(item)))`` in order: one thread prepares item after item, ``workers`` others finish them.

    One more item than there are workers is under way. Exceptions and callers that stop early are treated as by
    :func:`one_ahead`.

    Args:
        most: items that are under way or whose results wait for one that takes longer.
        begin_preparing, begin_finishing: called once in each of those threads.
    """
    preparing = ThreadPoolExecutor(1, initializer=begin_preparing)
    finishing = ThreadPoolExecutor(workers, initializer=begin_finishing)
    waiting: deque[tuple[_In, Future[_Out]]] = deque()
    try:
        for item in items:
            prepared = preparing.submit(prepare, item)
            waiting.append((item, finishing.submit(_finished, finish, prepared)))
            del prepared
            while waiting:
                under_way = [future for _, future in waiting if not future.done()]
                if waiting[0][1].done():
                    first, future = waiting.popleft()
                    yield first, future.result()
                    del future
                elif len(waiting) >= most or len(under_way) > workers:
                    wait(under_way, return_when=FIRST_COMPLETED)
                else:
                    break
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        # Nothing begins any more; then what has begun is waited for.
        finishing.shutdown(wait=False, cancel_futures=True)
        preparing.shutdown(cancel_futures=True)
        finishing.shutdown()


def _finished(finish: Callable[[_Between], _Out], prepared: Future[_Between]) -> _Out:
    return finish(prepared.result())
