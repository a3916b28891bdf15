"""What a runtime's process holds whatever the plan: its library, its own heap, its tokenizer's tables. Measured.

The figures are those of the Python packages on one platform, measured by ``make bench-memory``; another build of the
same runtime (a phone's, say) differs by a few MiB either way. A test measures again and turns red when a version moves
them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from acip_export.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class RuntimeBase:
    """One runtime's share of a process, beside the interpreter that drives it.

    Attributes:
        measured_with: packages and platform.
        library: bytes of code, sessions and allocators: everything that no model changes.
        token, merge: bytes that the tokenizer keeps for each token and each merge.
        building: share of that which building the tokenizer takes besides, and frees.
    """

    measured_with: str
    library: int
    token: int
    merge: int
    building: float = 0.0

    def tokenizer(self, tokens: int, merges: int) -> int:
        return self.token * tokens + self.merge * merges


# llama.cpp with two threads; each further one adds 0.4 MB. Tokens and merges are strings in hash tables; what they take
# is beside the tokenizer's bytes in the files, which plans count as well and which no runtime keeps in memory.
RUNTIME_BASES = {
    "llama.cpp": RuntimeBase("xllamacpp 2026.10.11549, Linux x86_64", 17_500_000, 280, 110),
    "onnxruntime-genai": RuntimeBase(
        "0.18.0 with onnxruntime 1.31.1, Linux x86_64", 38_400_000, 135, 135, building=0.6
    ),
    "onnxruntime": RuntimeBase("onnxruntime 1.31.1, Linux x86_64", 32_500_000, 0, 0),
}
# target -> the runtime that plans are made for: of models that generate, and of encoders.
_RECOMMENDED = {"gguf": ("llama.cpp", "llama.cpp"), "onnx": ("onnxruntime-genai", "onnxruntime")}


@dataclass(frozen=True)
class ProcessBase:
    """Bytes beside the model's own. ``building``: what the tokenizer takes while it is built, itself included."""

    library: int
    tokenizer: int
    building: int

    @property
    def total(self) -> int:
        return self.library + self.tokenizer


def process_base(target: str, checkpoint: Checkpoint, runtime: str | None = None) -> ProcessBase:
    """What a runtime holds for ``checkpoint`` beside the memory that a plan decides about; default: the recommended."""
    generator, encoder = _RECOMMENDED[target]
    base = RUNTIME_BASES[runtime or (generator if checkpoint.shape.generates else encoder)]
    tokens, merges = _tokenizer_size(checkpoint.path / "tokenizer.json")
    tokenizer = base.tokenizer(max(tokens, checkpoint.shape.vocabulary), merges)
    return ProcessBase(base.library, tokenizer, tokenizer + math.ceil(base.building * tokenizer))


def _tokenizer_size(file: Path) -> tuple[int, int]:
    if not file.is_file():
        return 0, 0
    status = file.stat()
    return _tokenizer_size_of(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _tokenizer_size_of(file: Path, modified: int, size: int) -> tuple[int, int]:  # noqa: ARG001 - part of the key
    """Tokens and merges. A damaged file is the converter's to refuse; here it has none."""
    try:
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        return len(model.get("vocab") or ()), len(model.get("merges") or ())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0, 0
