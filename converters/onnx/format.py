"""ONNX as the rest of the program sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.artifacts.plan import Plan, Serving, TensorDecision
from acip_export.formats.protocol import (
    Companion,
    ExportFormat,
    Layout,
    RunCommand,
    SessionClass,
)
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import ProgressCallback
from converters.onnx.backends import CPU, OTHERS, ROUNDED_CACHES, computed_in
from converters.onnx.memory import OnnxMemory
from converters.onnx.ort_format import ORT_KIND, check_size, write_ort
from converters.onnx.types import NUMBERS

if TYPE_CHECKING:
    import torch

    from acip_export.artifacts.materialized import MaterializedModel
    from acip_export.rounding.quantizer import InputMoments


@dataclass(frozen=True)
class OnnxFormat(ExportFormat):
    """What onnxruntime runs. Conversion is in :mod:`converters.onnx.converter`."""

    def refused_cache(self, checkpoint: Checkpoint, keys: str, values: str) -> str | None:
        from converters.onnx import converter

        if {keys, values} & ROUNDED_CACHES.keys():
            if not converter.has_builder(checkpoint):
                architecture, own = checkpoint.shape.architecture, next(iter(self.cache_types))
                return (
                    f"the graph of a {architecture} is traced, as onnxruntime-genai's model builder does not know it, "
                    f"and keeps its cache in {own}"
                )
            if checkpoint.shape.head_dim % 2:
                return f"its heads have {checkpoint.shape.head_dim} numbers, and two of int4 share a byte"
        return super().refused_cache(checkpoint, keys, values)

    def is_exact(self, plan: Plan) -> bool:
        return super().is_exact(plan) and plan.serving.cache_type_k not in ROUNDED_CACHES

    def serving_notes(self, serving: Serving) -> tuple[str, ...]:
        if serving.cache_type_k not in ROUNDED_CACHES:
            return ()
        return (
            f"onnxruntime-genai and plain onnxruntime run a KV cache of {serving.cache_type_k}; transformers.js and "
            "optimum make theirs in floats and refuse the file: for them  "
            f"--cache-type {computed_in(serving)}  instead, in a budget with room for it",
        )

    def check_model(self, checkpoint: Checkpoint) -> None:
        from converters.onnx import converter

        converter.check_model(checkpoint)

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

    def convert(self, model: MaterializedModel, out: Path, progress: ProgressCallback) -> None:
        from converters.onnx import converter

        converter.convert(model, out, progress)

    def imitate(
        self, checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving, out: Path
    ) -> None:
        from converters.onnx import converter

        converter.imitate(checkpoint, layout, tensors, serving, out)

    def round_trip(self, weight: torch.Tensor, name: str, inputs: InputMoments | None) -> torch.Tensor:
        from converters.onnx import converter

        return converter.round_trip(weight, name, inputs)

    def quantizer(self) -> str:
        from converters.onnx import converter

        return converter.quantizer()

    def missing_tensors(self, export: Path, model: MaterializedModel) -> tuple[int, Sequence[str]]:
        from converters.onnx.structure import missing_tensors

        return missing_tensors(export, model)

    def chat_template(self, export: Path) -> str | None:
        from acip_export.model.chat_template import find_chat_template

        return find_chat_template(export)

    def run_commands(self, plan: Plan, directory: Path, template: str | None = None) -> tuple[RunCommand, ...]:
        from converters.onnx.run_commands import run_commands

        return run_commands(plan, directory, template)


_ORT = Companion("ort", "Also OUT-ort, for reduced onnxruntime builds.", ORT_KIND, check_size, write_ort)

ONNX = OnnxFormat(
    name="onnx",
    description="a graph and its numbers for onnxruntime, onnxruntime-genai, transformers.js and optimum",
    weight_types=NUMBERS,
    types=CPU.types,
    embedding_types=CPU.embedding_types,
    vector_type=CPU.vector_type,
    cache_types=CPU.cache_types,
    cache_in_file=True,
    own_caches=frozenset({"f32", "f16"}),
    layouts=(Layout("factored", "factor pairs as two MatMul or MatMulNBits nodes, dense weights as one", "factored"),),
    runtimes={"onnxruntime": ("factored",)},
    # float32 in another order.
    float_tolerance=1e-4,
    sessions=(
        SessionClass("onnxruntime", "converters.onnx.runtimes.onnxruntime", "OnnxRuntimeSession", own_threads=True),
        SessionClass("onnxruntime-genai", "converters.onnx.runtimes.genai", "GenaiSession", own_threads=True),
    ),
    feedback_types=frozenset(form.name for form in NUMBERS if not form.is_float),
    tunable_types=frozenset(form.name for form in NUMBERS if not form.is_float),
    encoder_session=SessionClass(
        "onnxruntime", "converters.onnx.runtimes.onnx_encoder", "OnnxEncoderSession", own_threads=True
    ),
    chats=(
        SessionClass("onnxruntime-genai", "converters.onnx.runtimes.chat", "GenaiChatSession"),
        SessionClass("onnxruntime", "converters.onnx.runtimes.chat", "OnnxRuntimeChatSession"),
    ),
    memory=OnnxMemory(),
    backends=OTHERS,
    refused=CPU.refused,
    companions=(_ORT,),
    library="onnx",
    tags=("onnx", "onnxruntime"),
)
