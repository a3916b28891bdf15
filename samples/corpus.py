"""Text for the sample models: the source of Python's own standard library.

Files are split by the hash of their path, so the three parts are disjoint, the split does not depend on the
order of the directory listing, and the calibration and evaluation texts are never trained on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

EVALUATION_SHARE = 0.012
CALIBRATION_SHARE = 0.03
# Tables of data in Python syntax: large, repetitive, and nothing a language model should spend its steps on.
_SKIPPED_PARTS = {"site-packages", "__pycache__", "encodings", "lib2to3", "idlelib", "pydoc_data", "unicodedata"}
_LARGEST_FILE = 200_000


@dataclass(frozen=True)
class Corpus:
    """Documents of each part, sorted by path."""

    train: tuple[str, ...]
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]


def read_corpus(root: Path | None = None) -> Corpus:
    """Read every distinct ``.py`` file below ``root`` (default: this interpreter's standard library)."""
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[str]] = {"train": [], "calibration": [], "evaluation": []}
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS.intersection(relative.parts) or not 400 < path.stat().st_size < _LARGEST_FILE:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the library ships a few files in other encodings, as test data
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        parts[_part_of(relative)].append(text)
    return Corpus(**{name: tuple(texts) for name, texts in parts.items()})


def _part_of(relative: Path) -> str:
    draw = int.from_bytes(hashlib.sha256(relative.as_posix().encode()).digest()[:8], "big") / 2**64
    if draw < EVALUATION_SHARE:
        return "evaluation"
    return "calibration" if draw < EVALUATION_SHARE + CALIBRATION_SHARE else "train"
