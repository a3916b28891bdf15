"""Write docs/api.md from the docstrings of the package's public names: ``make docs``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "api.md"
HEAD = """# The Python interface

Made from the docstrings by `make docs`. Everything here is imported from `acip_export`; what is not here is internal.
"""


def reference() -> str:
    """Return the page: verbs and loaders with their signatures, then what they give and take."""
    import acip_export

    parts = [HEAD]
    for name in acip_export.__all__:
        if name == "__version__":
            continue
        value = getattr(acip_export, name)
        is_class = inspect.isclass(value)
        signature = "" if is_class else _signature(value)
        text = inspect.getdoc(value) or ""
        title = f"class {name}" if is_class else name
        parts.append(f"## `{title}`\n")
        if signature:
            parts.append(f"```python\n{_folded(name, signature)}\n```\n")
        parts.append(f"```text\n{text}\n```\n")
    return "\n".join(parts)


def _signature(function: Callable[..., Any]) -> str:
    """Return the signature as it is written, without the addresses of functions, which differ from run to run."""
    text = str(inspect.signature(function)).replace("'", "").replace("mappingproxy({})", "{}")
    return re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", text)


def _folded(name: str, signature: str) -> str:
    """Put every parameter of a long signature on a line of its own."""
    if len(name) + len(signature) <= 100:
        return name + signature
    depth, out = 0, ""
    for letter in signature:
        depth += (letter in "([") - (letter in ")]")
        if letter == "(" and depth == 1:
            out += "(\n    "
        elif letter == ")" and depth == 0:
            out += ",\n)"
        elif letter == "," and depth == 1:
            out += ",\n   "
        else:
            out += letter
    return name + out


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    FILE.write_text(reference(), encoding="utf-8")
