"""What each target can express: layouts, and the formats that a plan may choose in them. Pure data.

The planner builds its candidates from this table; constraints of a target are rows here, not branches in the planner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from acip_export.artifacts.plan import Representation
from acip_export.errors import PlanFileError, UnsupportedError
from acip_export.model.checkpoint import ModelShape
from acip_export.weight_types import WeightType, types_of, weight_type

# The name that stands for "the best predicted of all layouts that the runtime runs".
AUTO = "auto"


@dataclass(frozen=True)
class Layout:
    """One way to arrange a model in files.

    Attributes:
        low_rank: the representation that carries factor pairs; ``None`` when the layout has none.
        base_type: format of the all-zero base below an adapter.
        rank_multiple: ranks are multiples of this (the largest block that the pair's formats need is taken if larger).
        residual_pairs: types and ranks of low-rank corrections over a quantized base (both factors of one type).
        note: what a user has to know before choosing it.
    """

    name: str
    description: str
    low_rank: Representation | None
    base_type: str | None = None
    rank_multiple: int = 32
    residual_pairs: tuple[tuple[str, int], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Backend:
    """What runs an export, where that decides what the file may hold.

    Attributes:
        provider: onnxruntime-genai's name of it; ``None``: the default, the processor.
        types, embedding_types, vector_type, cache_types, refused: as those of :class:`Target`.
    """

    name: str
    description: str
    provider: str | None
    types: tuple[str, ...]
    embedding_types: tuple[str, ...]
    vector_type: str
    cache_types: dict[str, tuple[int, int]]
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A file format.

    Attributes:
        types: formats that a plan chooses from when the user names none, most precise first.
        embedding_types: formats that the embedding (and a head tied to it) may take.
        vector_type: format of norms and biases.
        cache_types: bytes of a KV cache entry as ``(numerator, denominator)``; the first is the default.
        layouts: the first is the default.
        runtimes: the layouts that each runtime runs, its default first; the first runtime is the default.
        options: what the target's converter can be told; flags of the command line with hyphens.
        refused: formats that what runs the target has no kernel for, and why that matters.
        windowed: Hugging Face classes whose sliding windows the runtime applies; ``None``: all of them.
    """

    name: str
    types: tuple[str, ...]
    embedding_types: tuple[str, ...]
    vector_type: str
    cache_types: dict[str, tuple[int, int]]
    layouts: tuple[Layout, ...]
    runtimes: dict[str, tuple[str, ...]]
    windowed: frozenset[str] | None = None
    backends: tuple[Backend, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def on(self, backend: str | None) -> Target:
        """The target as one backend has it; ``None``: the first, if there are any.

        Raises:
            UnsupportedError: no such backend.
        """
        if backend is None or backend == DEFAULT_BACKEND:
            return self
        for known in self.backends:
            if known.name == backend:
                return replace(
                    self,
                    types=known.types,
                    embedding_types=known.embedding_types,
                    vector_type=known.vector_type,
                    cache_types=known.cache_types,
                    refused=known.refused,
                )
        names = ", ".join((DEFAULT_BACKEND, *(known.name for known in self.backends)))
        raise UnsupportedError(f"{self.name} has no target {backend!r}; it has: {names}")

    def layout(self, name: str | None) -> Layout:
        """Raises UnsupportedError for a layout that the target does not have."""
        if name is None:
            return self.layouts[0]
        for layout in self.layouts:
            if layout.name == name:
                return layout
        known = ", ".join(layout.name for layout in self.layouts)
        raise UnsupportedError(f"{self.name} has no layout {name!r}; it has: {known}")

    def layouts_for(self, layout: str | None, runtime: str | None) -> tuple[Layout, ...]:
        """The layouts to plan for: the one that was named, or with ``auto`` every one that the runtime runs.

        Without a runtime, a named layout may be any; otherwise it is the default runtime.

        Raises:
            UnsupportedError: no such layout or runtime, or that runtime does not run that layout.
        """
        if runtime is not None and runtime not in self.runtimes:
            raise UnsupportedError(f"{self.name} has no runtime {runtime!r}; it has: {', '.join(self.runtimes)}")
        runs = self.runtimes[runtime or next(iter(self.runtimes))]
        if layout == AUTO:
            return tuple(self.layout(name) for name in runs)
        found = self.layout(layout or runs[0])
        if runtime is not None and found.name not in runs:
            others = [name for name, layouts in self.runtimes.items() if found.name in layouts]
            raise UnsupportedError(
                f"{runtime} does not run the layout {found.name!r}; choose  --runtime {' or '.join(others)}"
            )
        return (found,)

    def check_options(self, options: Mapping[str, str]) -> None:
        """Raises UnsupportedError for an option that the target's converter does not have."""
        for name in options:
            if name not in self.options:
                raise UnsupportedError(f"{self.name} exports have no --{name.replace('_', '-')}")

    def choose_types(self, names: tuple[str, ...]) -> tuple[WeightType, ...]:
        """The formats that the user named, or the default ones.

        Raises UnsupportedError for unknown names and for formats without a kernel.
        """
        # A graph computes in one precision, so formats of the other one are not to be had.
        items = {weight_type(self.name, name).item_bytes for name in self.types}
        known = [f.name for f in types_of(self.name) if f.item_bytes in items and f.name not in self.refused]
        for name in names:
            if name in self.refused:
                raise UnsupportedError(f"{name} is not exported: {self.refused[name]}. Use: {', '.join(known)}")
            if name not in known:
                raise UnsupportedError(f"{self.name} has no type {name!r} here; it has: {', '.join(known)}")
        return tuple(weight_type(self.name, name) for name in (names or self.types))


_SPLIT = "split_max_size"


def split_max_size(options: Mapping[str, str]) -> int | None:
    """Bytes that a file of the model may have, of a target's options; ``None``: any number.

    Raises:
        PlanFileError: it is no number of bytes.
    """
    found = options.get(_SPLIT)
    if found is None:
        return None
    if not (found.isascii() and found.isdigit() and int(found) > 0):
        raise PlanFileError(f"the plan's split_max_size is {found!r}, expected a number of bytes; plan again")
    return int(found)


# The backend that every target's own fields describe.
DEFAULT_BACKEND = "cpu"


# The name whose graphs have a cache of fixed length: neural processors know no other shapes.
STATIC_CACHE = "qnn-friendly"

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
    quantized = [form for form in types_of("onnx") if not form.is_float]
    return {form.name: reason for form in quantized for applies, reason in reversed(rules) if applies(form)}


def _half(name: str, description: str, provider: str, quantized: tuple[str, ...], *rules: Rule) -> Backend:
    """Graphics cards compute in float16: weights, scales, activations and the KV cache."""
    types = ("f16", *quantized)
    return Backend(name, description, provider, types, types, "f16", {"f16": (2, 1)}, _refused(*rules))


TARGETS: dict[str, Target] = {
    "gguf": Target(
        name="gguf",
        types=("f16", "q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q4_0", "q3_k", "iq3_xxs", "q2_k", "iq2_xxs"),
        embedding_types=("f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "q3_k", "q2_k"),
        vector_type="f32",
        cache_types={"f16": (2, 1), "q8_0": (34, 32), "f32": (4, 1)},
        layouts=(
            Layout("stock", "one file of dense tensors, a type per tensor; every llama.cpp loads it", None),
            Layout(
                "lora",
                "a LoRA file with factor pairs, over an all-zero one-bit base or as corrections of a quantized one; "
                "stock llama.cpp runs both",
                "lora",
                base_type="q1_0",
                # q8_0 needs ranks that are multiples of its block. More than rank 128 is better spent on the base.
                residual_pairs=(("f16", 8), ("f16", 16), ("q8_0", 32), ("q8_0", 64), ("q8_0", 128)),
            ),
            Layout(
                "factored",
                "one file with factor pairs as tensors of their own; a llama.cpp with our extension runs it",
                "factored",
                note="only a llama.cpp with our extension runs this layout: make llama-cpp, or docs/upstream.md",
            ),
        ),
        runtimes={"llama.cpp": ("stock", "lora"), "acip-llama.cpp": ("factored", "stock", "lora")},
        windowed=frozenset({"Gemma2ForCausalLM", "Gemma3ForCausalLM"}),
        options=("pre_tokenizer", "base_gguf", "imatrix", _SPLIT),
    ),
    "onnx": Target(
        name="onnx",
        # docs/onnx.md has what each type buys on the trained samples, and why 2 bits have to be named.
        types=_EMBEDDING,
        embedding_types=_EMBEDDING,
        vector_type="f32",
        cache_types={"f32": (4, 1)},
        layouts=(
            Layout("factored", "factor pairs as two MatMul or MatMulNBits nodes, dense weights as one", "factored"),
        ),
        runtimes={"onnxruntime": ("factored",)},
        backends=(
            _half(
                "webgpu",
                "graphics cards through WebGPU, in browsers and natively",
                "WebGPU",
                _HALF_8_BITS + _HALF_4_BITS,
            ),
            _half(
                "cuda",
                "NVIDIA graphics cards",
                "cuda",
                _HALF_8_BITS + _HALF_4_BITS,
                (lambda form: form.code_bits == 2, "releases of onnxruntime for CUDA multiply 4 and 8 bits only"),
            ),
            _half(
                "dml",
                "graphics cards through DirectML (Windows)",
                "dml",
                _HALF_4_BITS,
                (lambda form: form.code_bits != 4, "DirectML multiplies 4 bits only"),
            ),
            Backend(
                "mobile",
                "onnxruntime on ARM processors: Android, iOS, boards",
                None,
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
                None,
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
        ),
        refused=_refused(_NO_KERNEL),
    ),
}


def target(name: str, backend: str | None = None) -> Target:
    """Raises UnsupportedError for an unknown target, or one without this backend."""
    if name not in TARGETS:
        raise UnsupportedError(f"unknown format {name!r}; known: {', '.join(sorted(TARGETS))}")
    return TARGETS[name].on(backend)


def applies_window(name: str, shape: ModelShape) -> bool:
    """Whether the model has a sliding window that the target's runtime knows of."""
    windowed = target(name).windowed
    return shape.sliding_window is not None and (windowed is None or shape.architecture in windowed)


def longest_context(name: str, shape: ModelShape) -> int:
    """Tokens up to which the target's runtime computes what the model does.

    A runtime that does not know a model's sliding window attends to everything: the same only within the window.
    """
    if shape.sliding_window is None or applies_window(name, shape):
        return shape.max_context
    return min(shape.max_context, shape.sliding_window)
