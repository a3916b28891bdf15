"""Files of figures of the real model that grow by rows, each in the place of an earlier one of the same question."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def add_rows(file: Path, name: str, new: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Add rows to the list ``name`` of a file, with the machine and versions of now.

    Args:
        keys: rows that are equal in all of them answer the same question.
    """

    def question(row: dict[str, Any]) -> list[Any]:
        return [row[key] for key in keys]

    known = json.loads(file.read_text(encoding="utf-8"))[name] if file.exists() else []
    asked = [question(row) for row in new]
    result = {
        "model": "SmolLM2-135M-Instruct",
        name: [row for row in known if question(row) not in asked] + list(new),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("acip-export", "torch", "transformers", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
    }
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
