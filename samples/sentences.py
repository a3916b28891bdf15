"""Sentences for encoders: the English of Python's own documentation strings, one sentence a line.

    python -m samples.sentences --out .sentences

Writes ``calibration.txt`` and ``evaluation.txt``. Files are split by the hash of their path, as in ``corpus.py``, so
both parts are disjoint; a sentence that occurs in both is left out of the evaluation.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_EVALUATION_SHARE = 0.15
_SKIPPED_PARTS = {"site-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# A sentence of prose: starts with a capital, ends with a full stop, and has none of the signs of code and tables.
_PROSE = re.compile(r"[A-Z][\w ,;'\"()/-]{30,220}[.!?]")


def read_sentences(root: Path | None = None) -> tuple[list[str], list[str]]:
    """Calibration and evaluation sentences from the docstrings below ``root`` (default: the standard library)."""
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: tuple[dict[str, None], dict[str, None]] = {}, {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS.intersection(relative.parts):
            continue
        held_out = hashlib.sha256(relative.as_posix().encode()).digest()[0] < 256 * _EVALUATION_SHARE
        parts[held_out].update(dict.fromkeys(_sentences(path)))
    return list(parts[0]), [sentence for sentence in parts[1] if sentence not in parts[0]]


def _sentences(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # the library ships a few files in other encodings or with errors, as test data
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                    if _PROSE.fullmatch(sentence):
                        yield sentence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".sentences"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, sentences in zip(("calibration", "evaluation"), read_sentences(), strict=True):
        (args.out / f"{name}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
        print(f"{args.out / name}.txt: {len(sentences)} sentences")


if __name__ == "__main__":
    main()
