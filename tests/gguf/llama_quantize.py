"""The same matrices through our converter and through llama.cpp's own quantization, a type to each matrix.

    python -m tests.gguf.llama_quantize     # every type; writes goldens.json (make gguf-goldens)

Needs llama-cpp-python, for its ``llama_model_quantize``. Weights and importance are made of integers by NumPy's PCG64,
so that a golden does not depend on anyone's normal distribution.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from acip_export.api import materialize_bundle, write_imatrix
from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.scores import ScoreFile
from acip_export.model.checkpoint import Checkpoint
from acip_export.weight_types import types_of
from converters.gguf import converter
from converters.gguf.imatrix import read_imatrix
from converters.gguf.types import TYPE_IDS
from tests.support import make_model, make_plan, make_scores

GOLDENS = Path(__file__).with_name("goldens.json")
# The quantizer of q2_0 is ours.
TYPES = tuple(form.name for form in types_of("gguf") if form.name not in ("f32", "q2_0"))
# Building ggml's lookup tables for these takes seconds, in both libraries.
SLOW = frozenset({"iq1_m", "iq1_s", "iq2_s", "iq2_xs"})
_LAYERS = 4  # of seven matrices: one for every type
_TOKENS = 2048  # a power of two: sums over tokens keep every bit of the mean


def golden_model(directory: Path) -> tuple[Path, ScoreFile]:
    """A small Llama and a score file, all of whose matrices and moments are the same on every machine."""
    model = make_model(directory / "model", num_hidden_layers=_LAYERS)
    generator = np.random.Generator(np.random.PCG64(5))
    weights = load_file(model / "model.safetensors")
    for name in sorted(weights):
        shape = weights[name].shape
        # Cubes of a uniform number: outliers as weights have them, and exact in float32.
        small = generator.integers(-64, 65, shape)
        weights[name] = (small**3 / 2.0**20).astype(np.float32) if len(shape) == 2 else np.ones(shape, np.float32)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    made = make_scores(model)
    modules = {
        name: dataclasses.replace(
            module, input_moment=(generator.integers(1, 2**16, module.shape[1]) / 2.0**16).astype(np.float32)
        )
        for name, module in made.modules.items()
    }
    return model, dataclasses.replace(made, modules=modules, data=dataclasses.replace(made.data, tokens=_TOKENS))


def matrices(model: Path) -> dict[str, str]:
    """``{Hugging Face name: type}``."""
    names = [f"{module}.weight" for module in Checkpoint.open(model).linear_modules]
    return dict(zip(names, TYPES, strict=False))


def ours(model: Path, scores: ScoreFile, imatrix: Path, types: Iterable[str], out: Path) -> Path:
    """Our converter's file with ``types``, every other matrix as float32."""
    chosen, wanted = matrices(model), set(types)

    def rule(name: str, _shape: tuple[int, ...]) -> dict[str, Any]:
        form = chosen.get(name, "f32")
        return {"representation": "dense", "type": form if form in wanted else "f32"}

    plan = dataclasses.replace(make_plan(model, "gguf", "stock", rule), options={"imatrix": str(imatrix)})
    # As a user does: the score file's own moments are forgotten, the imatrix's are used.
    plain = {n: dataclasses.replace(m, input_moment=np.ones_like(m.input_moment)) for n, m in scores.modules.items()}
    bundle = materialize_bundle(
        Checkpoint.open(model), dataclasses.replace(scores, modules=plain), plan, out.with_suffix(".bundle")
    )
    out.mkdir()
    converter.convert(Bundle.open(bundle), out, lambda _: None)
    return out / "model.gguf"


def theirs(source: Path, imatrix: Path, types: dict[str, str], out: Path) -> Path:
    """``llama_model_quantize`` of the GGUF file ``source``: ``types`` by GGUF name, the rest stays float32."""
    import llama_cpp

    weights = [(name.encode(), values) for name, values in read_imatrix(imatrix).items()]
    entries = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
    for entry, (name, values) in zip(entries, weights, strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    # The first pattern that matches counts; the last one matches everything.
    patterns = [(name.replace(".", r"\."), form) for name, form in types.items()] + [("weight", "f32")]
    overrides = (llama_cpp.llama_model_tensor_override * (len(patterns) + 1))()
    for override, (pattern, form) in zip(overrides, patterns, strict=False):
        override.pattern, override.type = pattern.encode(), TYPE_IDS[form]
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = 7, 2  # LLAMA_FTYPE_MOSTLY_Q8_0: overrides count for quantized files only
    settings.token_embedding_type = TYPE_IDS["f32"]
    settings.imatrix, settings.tt_overrides = entries, overrides
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings)):
        raise AssertionError(f"llama_model_quantize refused {source}")
    return out


def hashes(file: Path) -> dict[str, str]:
    """SHA-256 of the data of every tensor, by its type's name and its own."""
    return {
        f"{tensor.tensor_type.name.lower()} {tensor.name}": hashlib.sha256(tensor.data.tobytes()).hexdigest()
        for tensor in gguf.GGUFReader(file).tensors
    }


def compare(directory: Path, types: Iterable[str], with_llama: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes of all quantized tensors, by our converter and by llama.cpp (if asked for)."""
    model, scores = golden_model(directory)
    imatrix = directory / "imatrix.gguf"
    write_imatrix(Checkpoint.open(model), scores, imatrix)
    mine = ours(model, scores, imatrix, types, directory / "ours")
    if not with_llama:
        return hashes(mine), {}
    source = ours(model, scores, imatrix, (), directory / "source")
    by_name = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(mine).tensors if "blk." in t.name}
    wanted = {name: form for name, form in by_name.items() if form in set(types)}
    return hashes(mine), hashes(theirs(source, imatrix, wanted, directory / "theirs.gguf"))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        mine, llama = compare(Path(scratch), TYPES, with_llama=True)
    different = sorted(name for name in mine.keys() | llama.keys() if mine.get(name) != llama.get(name))
    if different:
        raise SystemExit(f"not the same bytes: {different}")
    GOLDENS.write_text(json.dumps({k: v for k, v in mine.items() if not k.startswith("f32")}, indent=1) + "\n")
    sys.stdout.write(f"{len(TYPES)} types: the same bytes as llama.cpp; goldens written\n")


if __name__ == "__main__":
    main()
