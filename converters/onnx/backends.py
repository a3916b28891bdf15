"""What computes an ONNX graph, and what each of them lets the graph hold."""

from __future__ import annotations

from collections.abc import Callable

from acip_export.artifacts.plan import Serving
from acip_export.choices import instead_of
from acip_export.errors import UnsupportedError
from acip_export.formats.protocol import DEFAULT_BACKEND, Backend
from acip_export.weight_types import WeightType
from converters.onnx.types import NUMBERS

# The backend whose graphs have a cache of fixed length: neural processors know no other shapes.
STATIC_CACHE = "qnn-friendly"
# onnxruntime-genai's names of what computes; the processor is its default.
PROVIDERS = {"webgpu": "WebGPU", "cuda": "cuda", "dml": "dml"}

# KV caches whose attention computes with rounded numbers: bits of each.
ROUNDED_CACHES = {"int8": 8, "int4": 4}

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


CPU = Backend(
    DEFAULT_BACKEND,
    "processors",
    # docs/measurements/onnx.md has what each type gains on the trained samples, and why 2 bits have to be named.
    _EMBEDDING,
    _EMBEDDING,
    "f32",
    {"f32": (4, 1), **{name: (bits, 8) for name, bits in ROUNDED_CACHES.items()}},
    _refused(_NO_KERNEL),
)
OTHERS = (
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


def computed_in(serving: Serving) -> str:
    """Return the type in which a graph computes: its cache's, unless that is rounded."""
    return "f32" if serving.cache_type_k in ROUNDED_CACHES else serving.cache_type_k


def backend_of(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        UnsupportedError: there is no such backend.
    """
    for known in (CPU, *OTHERS):
        if known.name == name:
            return known
    raise UnsupportedError(f"onnx has no backend {name!r}; {instead_of(name, (b.name for b in (CPU, *OTHERS)))}")
