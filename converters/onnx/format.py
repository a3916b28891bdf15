"""ONNX as the rest of the program sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.artifacts.plan import Plan, Serving, TensorDecision
from acip_export.formats.protocol import (
    Backend,
    Companion,
    ExportFormat,
    Layout,
    ProgressCallback,
    RunCommand,
    SessionClass,
)
from acip_export.model.checkpoint import Checkpoint
from acip_export.weight_types import WeightType
from converters.onnx.memory import OnnxMemory
from converters.onnx.types import NUMBERS

if TYPE_CHECKING:
    import torch

    from acip_export.artifacts.bundle import Bundle

# The backend whose graphs have a cache of fixed length: neural processors know no other shapes.
STATIC_CACHE = "qnn-friendly"
# onnxruntime-genai's names of what computes; the processor is its default.
PROVIDERS = {"webgpu": "WebGPU", "cuda": "cuda", "dml": "dml"}


@dataclass(frozen=True)
class OnnxFormat(ExportFormat):
    """What onnxruntime runs. Conversion is in :mod:`converters.onnx.converter`."""

    def prepare(
        self, checkpoint: Checkpoint, backend: str, context: int, progress: ProgressCallback
    ) -> tuple[str, ...]:
        from converters.onnx import converter

        return converter.prepare(checkpoint, backend, context, progress)

    def predict_files(
        self, checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving
    ) -> dict[str, int]:
        from converters.onnx import converter

        return converter.predict_files(checkpoint, layout, tensors, serving)

    def convert(self, bundle: Bundle, out: Path, progress: ProgressCallback) -> None:
        from converters.onnx import converter

        converter.convert(bundle, out, progress)

    def round_trip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        from converters.onnx import converter

        return converter.round_trip(weight, name, importance)

    def quantizer(self) -> str:
        from converters.onnx import converter

        return converter.quantizer()

    def missing_tensors(self, export: Path, bundle: Bundle) -> tuple[int, Sequence[str]]:
        from converters.onnx.structure import missing_tensors

        return missing_tensors(export, bundle)

    def run_commands(self, plan: Plan, directory: Path) -> tuple[RunCommand, ...]:
        from converters.onnx import converter

        return converter.run_commands(plan, directory)


_EMBEDDING = ("f32", "int8", "int8-b128", "int4", "int4-b64", "int4-b128", "int4-b256")
_MOBILE = ("f32", "int8", "int8-b128", "int4", "int4-b64", "int4-b128")
_HALF_8_BITS = ("int8-f16", "int8-b128-f16")
_HALF_4_BITS = ("int4-f16", "int4-b64-f16", "int4-b128-f16")

Rule = tuple[Callable[[WeightType], bool], str]
# Measured, benchmarks/onnx_types.json.
_NO_KERNEL: Rule = (
    lambda form: form.code_bits == 2 and form.block in (16, 256),
    "onnxruntime has no kernel for 2 bits in blocks of 16 or 256 and expands the matrix to float32 for every product, "
    "about 200 times as slow",
)


def _refused(*rules: Rule) -> dict[str, str]:
    quantized = [form for form in NUMBERS if not form.is_float]
    return {form.name: reason for form in quantized for applies, reason in reversed(rules) if applies(form)}


def _half(name: str, description: str, quantized: tuple[str, ...], *rules: Rule) -> Backend:
    """Describe a graphics card: weights, scales, activations and the KV cache are in float16."""
    types = ("f16", *quantized)
    return Backend(name, description, types, types, "f16", {"f16": (2, 1)}, _refused(*rules))


def _check_ort(files: Mapping[str, int]) -> None:
    from converters.onnx.ort_format import check_size

    check_size(files)


def _write_ort(export: Path, out: Path, force: bool) -> dict[str, int]:
    from converters.onnx.ort_format import write_ort

    return write_ort(export, out, force)


_BACKENDS = (
    _half(
        "webgpu",
        "graphics cards through WebGPU, in browsers and natively",
        _HALF_8_BITS + _HALF_4_BITS,
    ),
    _half(
        "cuda",
        "NVIDIA graphics cards",
        _HALF_8_BITS + _HALF_4_BITS,
        (lambda form: form.code_bits == 2, "releases of onnxruntime for CUDA multiply 4 and 8 bits only"),
    ),
    _half(
        "dml",
        "graphics cards through DirectML (Windows)",
        _HALF_4_BITS,
        (lambda form: form.code_bits != 4, "DirectML multiplies 4 bits only"),
    ),
    Backend(
        "mobile",
        "onnxruntime on ARM processors: Android, iOS, boards",
        _MOBILE,
        _MOBILE,
        "f32",
        {"f32": (4, 1)},
        _refused(
            (lambda form: form.code_bits == 2, "onnxruntime has no kernel for 2 bits on ARM"),
            (
                lambda form: form.block % 32 != 0,
                "onnxruntime's fast kernels for ARM (KleidiAI) have blocks of multiples of 32",
            ),
        ),
    ),
    Backend(
        STATIC_CACHE,
        "Qualcomm's neural processors through onnxruntime-qnn: a cache of fixed length, standard attention",
        ("f16", "int8-f16", "int4-f16", "int4-b64-f16"),
        ("f16",),
        "f16",
        {"f16": (2, 1)},
        _refused(
            (lambda form: form.block not in (32, 64), "onnxruntime-qnn documents blocks of 32 and 64"),
            (
                lambda form: form.zero_point_bits > 0,
                "zero points triple the rounding there",
            ),
        ),
    ),
)


ONNX = OnnxFormat(
    name="onnx",
    description="a graph and its numbers for onnxruntime, onnxruntime-genai, transformers.js and optimum",
    weight_types=NUMBERS,
    # docs/onnx.md has what each type buys on the trained samples, and why 2 bits have to be named.
    types=_EMBEDDING,
    embedding_types=_EMBEDDING,
    vector_type="f32",
    cache_types={"f32": (4, 1)},
    layouts=(Layout("factored", "factor pairs as two MatMul or MatMulNBits nodes, dense weights as one", "factored"),),
    runtimes={"onnxruntime": ("factored",)},
    # float32 in another order.
    float_tolerance=1e-4,
    sessions=(
        SessionClass("onnxruntime", "converters.onnx.runtimes.onnxruntime", "OnnxRuntimeSession"),
        SessionClass("onnxruntime-genai", "converters.onnx.runtimes.genai", "GenaiSession"),
    ),
    encoder_session=SessionClass("onnxruntime", "converters.onnx.runtimes.onnx_encoder", "OnnxEncoderSession"),
    memory=OnnxMemory(),
    backends=_BACKENDS,
    refused=_refused(_NO_KERNEL),
    companions=(Companion("ort", "ONNX: also OUT-ort, for reduced onnxruntime builds.", _check_ort, _write_ort),),
    library="onnx",
    tags=("onnx", "onnxruntime"),
)
