"""Write docs/licences.md: the licence of everything that constraints.txt pins, by its own metadata."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/licences.md"
_HEAD = """# Licences of dependencies

acip-export is under the Apache License 2.0. It has none of these packages inside; `pip` installs them beside it.
Written by `make licences` from the metadata of the tested versions in `constraints.txt`, development tools included.

| package | version | licence, as its metadata says |
| --- | --- | --- |
"""


def pinned() -> dict[str, str]:
    """Versions by name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line)


def licence(package: Distribution) -> str:
    """Return an expression where there is one, else classifiers, else the first line of the text."""
    metadata = package.metadata
    expression, *_ = metadata.get_all("License-Expression", [""])
    if expression:
        return str(expression)
    named = [each.rpartition(" :: ")[2] for each in metadata.get_all("Classifier", []) if each.startswith("License ::")]
    text = str(metadata.get_all("License", [""])[0]).strip().partition("\n")[0]
    return ", ".join(named) or re.sub(r"[|`]", " ", text)[:60] or "not said"


def page() -> str:
    """Return the whole page. Packages that this platform has not are left out."""
    rows = []
    for name, version in sorted(pinned().items(), key=lambda item: item[0].lower()):
        try:
            rows.append(f"| {name} | {version} | {licence(distribution(name))} |")
        except PackageNotFoundError:
            rows.append(f"| {name} | {version} | not installed where this page was written |")
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
