"""Round two matrices at once, for parts of that cannot use more threads than one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from itertools import groupby
from operator import call
from typing import TypeVar

from acip_export.io.prefetch import one_ahead, some_ahead
from acip_export.machine import use_threads
from acip_export.units import ceil_div

# Matrices that are rounded at once, and the numbers of one that is rounded alone, for the sake of memory.
_SIDE_BY_SIDE, _LARGE = 2, 2**25
# Tensors of a layer, about: those that are rounded beside its largest matrix wait for that.
_AHEAD = 8

_Item = TypeVar("_Item")
_Rounded = TypeVar("_Rounded")


def is_large(numbers: int) -> bool:
    """Tell whether a matrix of so many numbers is rounded alone."""
    return numbers > _LARGE


def side_by_side(
    prepare: Callable[[_Item], Callable[[], _Rounded]], items: Iterable[_Item], numbers: Callable[[_Item], int]
) -> Generator[tuple[_Item, _Rounded]]:
    """Yield items with what is made of them, in order.

    Args:
        prepare: reads what an item is made of, and returns what makes it. Called for one item after the other with all
            threads, since what is known of inputs depends on how many there are.
        numbers: of an item, how many it has.
    """
    import torch

    threads = torch.get_num_threads()
    workers = min(threads, _SIDE_BY_SIDE)
    of_each = partial(use_threads, threads), partial(use_threads, ceil_div(threads, workers))
    for large, some in groupby(items, lambda item: is_large(numbers(item))):
        if large or workers == 1:
            yield from one_ahead(lambda item: prepare(item)(), some)
            continue
        try:
            yield from some_ahead(prepare, call, some, workers, _AHEAD, *of_each)
        finally:
            torch.set_num_threads(threads)  # what one thread sets, parts of torch take for all
