"""Computing ahead keeps the order, the number of results that exist, and the place of an error."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from acip_export.io.prefetch import one_ahead, some_ahead
from tests.support import interruption_heard


def test_order_and_overlap() -> None:
    """The second item is computed while the caller has the first: without that, the wait would never end."""
    computed = [threading.Event() for _ in range(4)]

    def compute(item: int) -> int:
        computed[item].set()
        return item * item

    seen = []
    for item, result in one_ahead(compute, range(4)):
        assert computed[min(item + 1, 3)].wait(10)
        assert not any(event.is_set() for event in computed[item + 2 :])
        seen.append(result)
    assert seen == [0, 1, 4, 9]
    assert list(one_ahead(compute, [])) == []


def test_an_error_is_raised_where_its_item_is_due() -> None:
    made = one_ahead(lambda item: 1 // item, [1, 0, 1])
    assert next(made) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_an_interruption_waits_only_for_what_has_begun() -> None:
    """Ctrl-C comes while the second item is computed and the third one waits for its turn."""
    begun, interrupted = [], interruption_heard()

    def compute(item: int) -> None:
        begun.append(item)
        if item == 2:
            time.sleep(0.3)  # until the third waits
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            interrupted.wait(60)
            time.sleep(0.5)  # the one who asked hears of it meanwhile

    with pytest.raises(KeyboardInterrupt):
        list(one_ahead(compute, [1, 2, 3, 4]))
    assert begun == [1, 2]


def test_two_are_finished_side_by_side() -> None:
    """Each of two waits for the other to begin, and no more than three are under way."""
    begun = [threading.Event() for _ in range(6)]
    prepared, threads = [], threading.local()

    def prepare(item: int) -> int:
        prepared.append(item)
        return item

    def finish(item: int) -> tuple[int, int]:
        begun[item].set()
        assert begun[item ^ 1].wait(10)
        return item * item, threads.number

    def begin() -> None:
        threads.number = 7

    seen = []
    for item, result in some_ahead(prepare, finish, range(6), 2, 4, lambda: None, begin):
        assert prepared[-1] <= item + 3
        seen.append((item, *result))
    assert seen == [(item, item * item, 7) for item in range(6)]


def test_short_ones_are_finished_beside_a_long_one() -> None:
    """The first waits for the fifth to be finished: five may exist, and the sixth is not begun."""
    fifth, prepared = threading.Event(), []

    def prepare(item: int) -> int:
        prepared.append(item)
        return item

    def finish(item: int) -> int:
        if item == 0:
            assert fifth.wait(10)
        elif item == 4:
            fifth.set()
        return item

    made = some_ahead(prepare, finish, range(9), 2, 5, *[lambda: None] * 2)
    assert next(made) == (0, 0)
    assert prepared == [0, 1, 2, 3, 4]
    assert list(made) == [(item, item) for item in range(1, 9)]


@pytest.mark.parametrize("failing", ["prepare", "finish"])
def test_the_error_of_either_stage_is_raised_where_its_item_is_due(failing: str) -> None:
    def fail(stage: str, item: int) -> int:
        return 1 // item if stage == failing else item

    made = some_ahead(lambda i: fail("prepare", i), lambda i: fail("finish", i), [1, 0, 1], 2, 4, *[lambda: None] * 2)
    assert next(made) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(made)
