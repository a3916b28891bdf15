"""Say what a name that is none of several was probably meant as. Messages of every kind of choice are made here."""

from __future__ import annotations

from collections.abc import Iterable


def instead_of(name: str, choices: Iterable[str], known: str = "it has") -> str:
    """Return all choices, and that which is nearest to ``name``, if one is like it: the end of a message.

    Args:
        known: what the list of all choices is introduced with.
    """
    listed = list(choices)
    close = nearest(name, listed)
    return f"{known}: {', '.join(listed)}{f'; did you mean {close[0]}?' if close else ''}"


def nearest(name: str, choices: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return at most so many choices that are like ``name``, the nearest first.

    One that begins with it is like it; capitals and the kind of dash do not count.
    """
    from difflib import get_close_matches  # only where something is wrong

    folded = {_folded(choice): choice for choice in choices}
    begun = [choice for start, choice in folded.items() if name and start.startswith(_folded(name))]
    return begun[:most] or [folded[close] for close in get_close_matches(_folded(name), folded, most, cutoff)]


def _folded(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")
