"""The format ``tiny`` as acip-export sees it: half precision or eight bits a number, one scale a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.artifacts.plan import Plan, Serving, TensorDecision
from acip_export.formats.protocol import (
    ExportFormat,
    Layout,
    Option,
    ProcessBase,
    RunCommand,
    ServingMemory,
    SessionClass,
    TensorMemory,
)
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.shape import ModelShape
from acip_export.progress import ProgressCallback
from acip_export.weight_types import WeightType

if TYPE_CHECKING:
    import torch

    from acip_export.artifacts.materialized import MaterializedModel
    from acip_export.rounding.quantizer import InputMoments


@dataclass(frozen=True)
class RowWise(WeightType):
    """Eight bits a number and one float32 scale a row, whatever its length."""

    def nbytes(self, rows: int, columns: int) -> int:
        return rows * (columns + 4)


TYPES = (
    WeightType("f32", "tiny", 1, 4, 0.0),
    WeightType("f16", "tiny", 1, 2, 4.32e-8),
    RowWise("row8", "tiny", 32, 32, 2e-4, pads_rows=True),
)


class TinyMemory:
    """PyTorch holds everything in float32, and the logits of a whole context."""

    def serving(self, shape: ModelShape, serving: Serving) -> ServingMemory:
        cache = 8 * shape.layers * shape.kv_heads * shape.head_dim * serving.context
        wide = 4 * serving.context * (4 * shape.ffn + 8 * shape.hidden)
        return ServingMemory(cache, wide, 4 * serving.context * shape.vocabulary)

    def beside(self, decision: TensorDecision, embedding: bool, tied_head: bool) -> TensorMemory:
        numbers = 1
        for extent in decision.shape:
            numbers *= extent
        return TensorMemory(kept=4 * numbers)

    def anonymous(self, decision: TensorDecision, embedding: bool, tied_head: bool) -> TensorMemory:
        return self.beside(decision, embedding, tied_head)

    def thread(self, shape: ModelShape, serving: Serving, tensors: Sequence[TensorDecision]) -> int:
        return 0

    def process(self, checkpoint: Checkpoint, runtime: str | None = None) -> ProcessBase:
        return ProcessBase(library=400_000_000, tokenizer=0, building=0, heap=100_000_000)


@dataclass(frozen=True)
class TinyFormat(ExportFormat):
    """See :mod:`tinyformat.files` for what is written."""

    def predict_files(
        self, checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving
    ) -> dict[str, int]:
        from tinyformat import files  # type: ignore[import-not-found]

        return files.predict(checkpoint, tensors)

    def convert(self, model: MaterializedModel, out: Path, progress: ProgressCallback) -> None:
        from tinyformat import files  # type: ignore[import-not-found]

        files.write(model, out)

    def round_trip(self, weight: torch.Tensor, name: str, inputs: InputMoments | None) -> torch.Tensor:
        from tinyformat import files  # type: ignore[import-not-found]

        return files.decode(files.encode(weight, name))

    def quantizer(self) -> str:
        return "tinyformat 0.1.0"

    def missing_tensors(self, export: Path, model: MaterializedModel) -> tuple[int, Sequence[str]]:
        from tinyformat import files  # type: ignore[import-not-found]

        return files.missing(export, model)

    def run_commands(self, plan: Plan, directory: Path, template: str | None = None) -> tuple[RunCommand, ...]:
        return (RunCommand("tiny", "console", f"tiny-run {directory}"),)


TINY = TinyFormat(
    name="tiny",
    description="one safetensors file for PyTorch",
    weight_types=TYPES,
    types=("f16", "row8"),
    embedding_types=("f16", "row8"),
    vector_type="f32",
    cache_types={"f32": (4, 1)},
    layouts=(Layout("dense", "one matrix a layer", None),),
    runtimes={"pytorch": ("dense",)},
    float_tolerance=1e-3,
    sessions=(SessionClass("pytorch", "tinyformat.session", "TinySession"),),
    memory=TinyMemory(),
    options=(Option("tiny_comment", "tiny: a line of text that is kept in the file.", parse=str.strip),),
    library="tiny",
    tags=("tiny",),
)
