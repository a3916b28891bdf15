"""Our files have the bytes that llama.cpp's own quantization gives, for the same type and importance weights."""

from __future__ import annotations

import json
import platform
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.gguf.llama_quantize import GOLDENS, SLOW, TYPES, compare

FAST = [name for name in TYPES if name not in SLOW]
needs_quantize = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="needs llama-cpp-python's llama_model_quantize: make llama-cpp"
)
on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="goldens are of x86-64; elsewhere compilers round a * b + c once, and other scales win",
)


@needs_quantize
def test_same_bytes_as_llama_model_quantize(tmp_path: Path) -> None:
    mine, llama = compare(tmp_path, FAST, with_llama=True)
    assert mine == llama
    assert {name.split()[0] for name in mine} == {"f32", *FAST}


@on_x86
def test_same_bytes_as_goldens(tmp_path: Path) -> None:
    """``make gguf-goldens`` made them, by the comparison above, of all types; the slow ones are compared there only."""
    goldens = json.loads(GOLDENS.read_text())
    assert {name.split()[0] for name in goldens} == set(TYPES)
    mine, _ = compare(tmp_path, FAST, with_llama=False)
    expected = {name: value for name, value in goldens.items() if name.split()[0] in FAST}
    assert {name: value for name, value in mine.items() if not name.startswith("f32")} == expected
