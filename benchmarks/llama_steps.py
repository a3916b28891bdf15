"""llama.cpp's two steps from a Hugging Face model to a quantized GGUF, each as a process of its own for gguf_export.py.

    python -m benchmarks.llama_steps convert LLAMA_CPP MODEL OUT
    python -m benchmarks.llama_steps quantize SOURCE OUT [IMATRIX]
    python -m benchmarks.llama_steps preset SOURCE OUT IMATRIX PRESET     as llama-quantize does: Q4_K_M, IQ3_XS, ...

A file apart, so that neither process loads what only ours needs.
"""

from __future__ import annotations

import ctypes
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

_Q4_K_M, _Q4_K = 15, 12  # enum llama_ftype, enum ggml_type


def convert(llama_cpp: Path, model: Path, out: Path) -> None:
    """``convert_hf_to_gguf.py``, told the pre-tokenizer, which it knows by hashing real token ids."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    base = __import__("conversion.base", fromlist=["TextModel"])
    base.TextModel.get_vocab_base_pre = lambda *_: "llama-bpe"
    script = str(llama_cpp / "convert_hf_to_gguf.py")
    sys.argv = [script, str(model), "--outfile", str(out), "--outtype", "bf16"]
    runpy.run_path(script, run_name="__main__")


def quantize(source: Path, out: Path, imatrix: Path | None = None) -> None:
    """llama.cpp's second step, every matrix in one type."""
    _quantize(source, out, imatrix, ftype=_Q4_K_M, pure=True, token_embedding_type=_Q4_K, output_tensor_type=_Q4_K)


def preset(source: Path, out: Path, imatrix: Path, name: Path) -> None:
    """llama.cpp's second step, by one of ``llama-quantize``'s names for a mixture of types."""
    import llama_cpp

    _quantize(source, out, imatrix, ftype=getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"))


def _quantize(source: Path, out: Path, imatrix: Path | None, **fields: int) -> None:
    import llama_cpp

    from acip_export.machine import processors
    from converters.gguf.imatrix import read_imatrix

    known = {} if imatrix is None else read_imatrix(imatrix)
    weights = [(name.encode(), values) for name, values in known.items()]
    entries = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
    for entry, (name, values) in zip(entries, weights, strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = processors()
    for field, value in fields.items():
        setattr(settings, field, value)
    if weights:
        settings.imatrix = entries
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama_model_quantize refused {source}")


if __name__ == "__main__":
    steps: dict[str, Callable[..., None]] = {"convert": convert, "quantize": quantize, "preset": preset}
    steps[sys.argv[1]](*map(Path, sys.argv[2:]))
