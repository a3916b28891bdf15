"""What a base model's directory says about its origin: license and Hugging Face id."""

from __future__ import annotations

import io
import re
from pathlib import Path

from acip_export.errors import InputError
from acip_export.io.inputs import open_input

# As the hub's own cache names its directories: models--OWNER--NAME/snapshots/COMMIT.
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)$")
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9.+-]*)[\"']?[ \t]*$", re.MULTILINE)
_LARGEST_CARD = 1_000_000


def license_of(model: Path) -> str:
    """The identifier in the front matter of the model's card; empty where there is none."""
    card = model / "README.md"
    try:
        with open_input(card, InputError) as stream, io.TextIOWrapper(stream, "utf-8", "replace") as lines:
            text = lines.read(_LARGEST_CARD)
    except (InputError, OSError):
        return ""
    start, _, rest = text.partition("---")
    front, end, _ = rest.partition("\n---")
    match = _LICENSE.search(front) if not start.strip() and end else None
    return "" if match is None else match[1].lower()


def hub_id(model: Path) -> str:
    """``owner/name`` of a model in the hub's cache; empty for any other directory."""
    for part in model.resolve().parts:
        match = _CACHED.fullmatch(part)
        if match is not None:
            return f"{match[1]}/{match[2]}"
    return ""
