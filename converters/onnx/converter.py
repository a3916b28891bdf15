"""A plan's tensors to ONNX: a directory for onnxruntime, onnxruntime-genai, transformers.js and optimum.

The prediction measures the graph that is written: both are a marked graph, made once for a configuration, with the
plan's nodes in place of its marks (:mod:`converters.onnx.graph.substitute`).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.plan import Serving, TensorDecision
from acip_export.choices import instead_of
from acip_export.errors import MissingExtraError, UnsupportedError, VerificationError
from acip_export.formats.protocol import DEFAULT_BACKEND
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Progress, ProgressCallback, silent
from acip_export.rounding.quantizer import InputMoments
from acip_export.version import __version__
from acip_export.weight_types import weight_type
from converters.onnx.backends import ROUNDED_CACHES, backend_of, computed_in
from converters.onnx.companion_files import DATA_FILE, MODEL_FILE, small_files, tokenizer_notes
from converters.onnx.genai_builder.families import FAMILIES
from converters.onnx.genai_builder.release import check_release
from converters.onnx.types import NUMBERS

if TYPE_CHECKING:
    import torch

    from converters.onnx.genai_builder.module_tree import ReadVector
    from converters.onnx.graph.decided import Contents
    from converters.onnx.matrices import ChunkReader
    from converters.onnx.writer import Packed

LAYOUT = "factored"
# What runs the graphs that the model builder does not make.
_PROCESSORS = (DEFAULT_BACKEND, "mobile")
_PACKAGES = {
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxruntime": "onnxruntime",
    "onnxruntime_genai": "onnxruntime-genai",
}


@dataclass(frozen=True)
class Options:
    """Settings of the written graph that change no size.

    Attributes:
        accuracy_level: of quantized products. 4 rounds activations to int8 block by block and is about twice as fast in
            decoding; 0 computes in float32 and agrees with the reference to rounding.
    """

    accuracy_level: int = 4


def prepare(checkpoint: Checkpoint, backend: str, context: int, progress: ProgressCallback) -> tuple[str, ...]:
    """See :class:`acip_export.formats.protocol.ExportFormat`.

    Once for a configuration, the model builder takes seconds, and tracing from ten seconds to minutes.
    """
    _check_execution(checkpoint, backend)
    if not checkpoint.shape.generates:
        return ()
    _check_packages()
    from converters.onnx.graph.marked import marked_graph

    progress(Progress("graph", 0, 1, checkpoint.shape.architecture))
    if has_builder(checkpoint):
        from converters.onnx.genai_builder.decoder import marked_decoder

        half = "f16" in backend_of(backend).cache_types
        recipe = marked_decoder(checkpoint.config, checkpoint.shape, backend, half, context)
    else:
        from converters.onnx.tracing.decoder import traced

        recipe = traced(checkpoint.config, context)
    marked_graph(recipe)
    progress(Progress("graph", 1, 1, checkpoint.shape.architecture))
    notes = tokenizer_notes(checkpoint.path)
    if has_builder(checkpoint):
        return notes
    return (
        *notes,
        f"through torch.onnx.export, as onnxruntime-genai's builder does not know a {checkpoint.shape.architecture}: "
        "slower, because less of it is fused",
    )


def check_model(checkpoint: Checkpoint) -> None:
    """See :class:`acip_export.formats.protocol.ExportFormat`."""
    _check_packages()
    small_files(checkpoint, Serving(checkpoint.shape.max_context, "f32", 1))


def predict_files(
    checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving
) -> dict[str, int]:
    """Exact bytes of every file; see :class:`acip_export.formats.protocol.ExportFormat`."""
    _check(layout, serving)
    _check_types(tensors, serving)
    if has_builder(checkpoint):
        check_release()
    packed, _ = _graph(checkpoint, tensors, serving, Options(), read_vector=None)
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in small_files(checkpoint, serving).items()
    }
    return {**sizes, MODEL_FILE: len(packed.protobuf), DATA_FILE: packed.data_bytes}


def convert(model: MaterializedModel, out: Path, progress: ProgressCallback, options: Options | None = None) -> None:
    """Write the export; see :class:`acip_export.formats.protocol.ExportFormat`."""
    plan = model.plan
    _check(plan.layout, plan.serving)
    _check_types(plan.tensors, plan.serving)
    checkpoint = model.as_checkpoint()
    options = options or Options()
    graph = _graph(checkpoint, plan.tensors, plan.serving, options, read_vector=model.read)

    from converters.onnx.matrices import MatrixReader

    packed, contents = graph
    with MatrixReader(model, contents.values()) as reader:
        _write(checkpoint, plan.serving, packed, contents, reader, out, progress)
    cache_type = plan.serving.cache_type_k
    if cache_type in ROUNDED_CACHES:
        from converters.onnx.cache_scales import calibrate_cache

        exact = replace(plan.serving, cache_type_k="f32", cache_type_v="f32")
        packed, _ = _graph(checkpoint, plan.tensors, exact, options, read_vector=None)
        calibrate_cache(out, packed.protobuf, cache_type, progress)


def imitate(
    checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving, out: Path
) -> None:
    """See :class:`acip_export.formats.protocol.ExportFormat`."""
    import torch

    from converters.onnx.matrices import NoiseReader

    _check(layout, serving)
    _check_types(tensors, serving)
    shapes = {decision.name: decision.shape for decision in tensors}
    graph = _graph(checkpoint, tensors, serving, Options(), read_vector=lambda name: torch.ones(shapes[name]))
    _write(checkpoint, serving, *graph, NoiseReader(), out, silent)


def _write(
    checkpoint: Checkpoint,
    serving: Serving,
    packed: Packed,
    contents: Contents,
    reader: ChunkReader,
    out: Path,
    progress: ProgressCallback,
) -> None:
    """Write graph, numbers and small files.

    Raises:
        VerificationError: the numbers are not as many as the graph describes.
    """
    from converters.onnx.writer import write_data

    for name, content in small_files(checkpoint, serving).items():
        (out / name).parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            (out / name).write_bytes(content)
        else:
            shutil.copyfile(content, out / name)
    (out / MODEL_FILE).parent.mkdir()
    (out / MODEL_FILE).write_bytes(packed.protobuf)
    write_data(out / DATA_FILE, packed.data_bytes, contents, reader, progress)
    written = (out / DATA_FILE).stat().st_size
    if written != packed.data_bytes:
        raise VerificationError(f"{DATA_FILE} has {written:,} bytes, its graph describes {packed.data_bytes:,}")


def _check(layout: str, serving: Serving) -> None:
    if layout != LAYOUT:
        raise UnsupportedError(f"ONNX has no layout {layout!r}; {instead_of(layout, (LAYOUT,))}")
    caches = backend_of(serving.backend).cache_types
    if serving.cache_type_k not in caches or serving.cache_type_k != serving.cache_type_v:
        raise UnsupportedError(
            f"ONNX exports for {serving.backend} keep the KV cache in {', '.join(caches)}, not {serving.cache_types}; "
            f"use --cache-type {next(iter(caches))}"
        )
    _check_packages()


def _check_packages() -> None:
    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise MissingExtraError(package, "onnx", "the ONNX converter")


def _check_execution(checkpoint: Checkpoint, backend: str) -> None:
    if backend in _PROCESSORS or (checkpoint.shape.generates and has_builder(checkpoint)):
        return
    kind = (
        f"a {checkpoint.shape.architecture}, which the model builder does not know, is"
        if checkpoint.shape.generates
        else "encoders are"
    )
    raise UnsupportedError(f"{kind} exported for --backend {' or '.join(_PROCESSORS)}, not {backend}")


def _check_types(tensors: tuple[TensorDecision, ...], serving: Serving) -> None:
    """Raises UnsupportedError for a number that what runs the graph does not compute with."""
    known = {form.name: form.item_bytes for form in NUMBERS}
    computed = computed_in(serving)
    wanted, refused = known[computed], backend_of(serving.backend).refused
    for decision in tensors:
        for name in decision.types:
            again = f"plan again with  --backend {serving.backend}"
            if name in refused:
                raise UnsupportedError(f"{decision.name} is planned as {name}: {refused[name]}; {again}")
            if name in known and known[name] != wanted:
                raise UnsupportedError(
                    f"{decision.name} is planned as {name}, but a graph for {serving.backend} computes in "
                    f"{computed}; {again}"
                )


def _graph(
    checkpoint: Checkpoint,
    tensors: tuple[TensorDecision, ...],
    serving: Serving,
    options: Options,
    read_vector: ReadVector | None,
) -> tuple[Packed, Contents]:
    from converters.onnx.writer import pack

    _check_execution(checkpoint, serving.backend)
    config, shape, level = checkpoint.config, checkpoint.shape, options.accuracy_level
    encoder = checkpoint.encoder
    if encoder is not None:
        from converters.onnx.graph.encoder import build_encoder

        model, contents = build_encoder(config, encoder, tensors, level)
    elif has_builder(checkpoint):
        from converters.onnx.genai_builder.decoder import build_decoder

        model, contents = build_decoder(config, shape, tensors, serving, level, read_vector)
    else:
        from converters.onnx.tracing.decoder import build_traced

        model, contents = build_traced(config, shape, tensors, serving.context, level)
    if serving.cache_type_k in ROUNDED_CACHES:
        from converters.onnx.graph.rounded_cache import round_cache

        round_cache(model, contents, serving.cache_type_k, shape)
    return pack(model, Path(DATA_FILE).name), contents


def has_builder(checkpoint: Checkpoint) -> bool:
    """Whether the model builder knows the architecture; any other is traced."""
    return checkpoint.config.get("model_type") in FAMILIES


def quantizer() -> str:
    """See :class:`acip_export.formats.protocol.ExportFormat`."""
    return f"acip-export {__version__}"


def round_trip(weight: torch.Tensor, name: str, inputs: InputMoments | None) -> torch.Tensor:
    """See :class:`acip_export.formats.protocol.ExportFormat`."""
    from converters.onnx.matrices import rounded

    return rounded(weight, weight_type("onnx", name), inputs or InputMoments())
