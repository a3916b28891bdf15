"""Parts of a page that scripts write: what stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``."""

from __future__ import annotations


def marked(text: str, name: str) -> str:
    """Return the part of that name."""
    return text.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0].strip()


def with_marked(text: str, name: str, new: str) -> str:
    """Return ``text`` with ``new`` as its part of that name."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{new}\n{end}{after}"
