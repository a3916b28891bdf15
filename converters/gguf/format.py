"""GGUF as the rest of the program sees it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.artifacts.plan import Plan, Serving, TensorDecision
from acip_export.formats.protocol import ExportFormat, RunCommand, SessionClass, TensorLimit
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.shape import ModelShape
from acip_export.progress import ProgressCallback
from converters.gguf import options
from converters.gguf.layouts import LAYOUTS
from converters.gguf.memory import CACHE_TYPES, LlamaMemory, cache_block
from converters.gguf.types import FEEDBACK_TYPES, GGML, TUNABLE_TYPES

if TYPE_CHECKING:
    import torch

    from acip_export.artifacts.materialized import MaterializedModel
    from acip_export.rounding.quantizer import InputMoments


@dataclass(frozen=True)
class GgufFormat(ExportFormat):
    """What llama.cpp runs. Conversion is in :mod:`converters.gguf.converter`."""

    def applies_window(self, shape: ModelShape) -> bool:
        from converters.gguf.architectures import applies_window

        return applies_window(shape.architecture)

    def refused_cache(self, checkpoint: Checkpoint, keys: str, values: str) -> str | None:
        head_size = checkpoint.shape.head_dim
        refused = [name for name in dict.fromkeys((keys, values)) if head_size % cache_block(name)]
        if not refused:
            return None
        block = cache_block(refused[0])
        possible = ", ".join(name for name in CACHE_TYPES if head_size % cache_block(name) == 0)
        return (
            f"its heads have {head_size} numbers, no multiple of the {block} that a block of {refused[0]} has, and "
            f"llama.cpp refuses it; possible are {possible}"
        )

    def is_exact(self, plan: Plan) -> bool:
        # Attention rounds keys and values to float16 anyway, which the tolerance is made for.
        return super().is_exact(plan) and {plan.serving.cache_type_k, plan.serving.cache_type_v} <= {"f32", "f16"}

    def unknown_types(self, options_: Mapping[str, str]) -> Mapping[str, str]:
        return options.unknown_types(options_)

    def tensor_limit(self, options_: Mapping[str, str]) -> TensorLimit | None:
        return options.tensor_limit(options_)

    def type_notes(self, types: Collection[str], options_: Mapping[str, str]) -> tuple[str, ...]:
        return options.type_notes(types, options_)

    def file_notes(self, files: Mapping[str, int], options_: Mapping[str, str]) -> tuple[str, ...]:
        return options.file_notes(files, options_)

    def check_model(self, checkpoint: Checkpoint) -> None:
        from converters.gguf import converter

        converter.check_model(checkpoint)

    def predict_files(
        self, checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving
    ) -> dict[str, int]:
        from converters.gguf import converter

        return converter.predict_files(checkpoint, layout, tensors, serving)

    def convert(self, model: MaterializedModel, out: Path, progress: ProgressCallback) -> None:
        from converters.gguf import converter

        converter.convert(model, out, progress)

    def imitate(
        self, checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving, out: Path
    ) -> None:
        from converters.gguf import converter

        converter.imitate(checkpoint, layout, tensors, serving, out)

    def round_trip(self, weight: torch.Tensor, name: str, inputs: InputMoments | None) -> torch.Tensor:
        from converters.gguf import converter

        return converter.round_trip(weight, name, inputs)

    def quantizer(self) -> str:
        from converters.gguf import converter

        return converter.quantizer()

    def missing_tensors(self, export: Path, model: MaterializedModel) -> tuple[int, Sequence[str]]:
        from converters.gguf.structure import missing_tensors

        return missing_tensors(export, model)

    def chat_template(self, export: Path) -> str | None:
        from acip_export.inspection.gguf import read_head
        from converters.gguf.arrange import model_file

        template = read_head(model_file(export)).values.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def run_commands(self, plan: Plan, directory: Path, template: str | None = None) -> tuple[RunCommand, ...]:
        from converters.gguf.run_commands import run_commands

        return run_commands(plan, directory, template)

    def server(self, plan: Plan, export: Path, host: str, port: int, program: str | None) -> tuple[str, ...]:
        from converters.gguf.serve import server_command

        return server_command(plan, export, host, port, program)


GGUF = GgufFormat(
    name="gguf",
    description="files of llama.cpp: one of dense tensors, or with factor pairs",
    weight_types=GGML,
    # iq2_xs is where a mix of its neighbours is; the tables of the types of one bit take half a minute to build.
    types=(
        "f16",
        "q8_0",
        "q6_k",
        "q5_k",
        "q4_k",
        "iq4_xs",
        "q4_0",
        "q3_k",
        "iq3_s",
        "iq3_xxs",
        "q2_k",
        "iq2_s",
        "iq2_xxs",
    ),
    # For rows that are no multiple of 256, as many small models have them (576, 640, 896, 960).
    narrow_types=("q5_1", "q5_0", "q4_1", "iq4_nl", "q2_0"),
    embedding_types=("f16", "q8_0", "q6_k", "q5_1", "q5_k", "q5_0", "q4_1", "q4_k", "q4_0", "iq4_nl", "q3_k", "q2_k"),
    vector_type="f32",
    feedback_types=FEEDBACK_TYPES,
    tunable_types=TUNABLE_TYPES,
    cache_types=CACHE_TYPES,
    layouts=LAYOUTS,
    runtimes={"llama.cpp": ("stock", "lora"), "acip-llama.cpp": ("factored", "stock", "lora")},
    # llama.cpp's tanh form of GELU is from a float16 table; its attention rounds K and V to float16: large logits move
    # further, and mean as little as small ones. The KL is sixty times what the rounding costs on a trained model, a
    # thousandth of what four-bit weights do.
    float_tolerance=2e-2,
    float_kl=1e-5,
    sessions=(SessionClass("llama.cpp", "converters.gguf.runtimes.llama_cpp", "LlamaCppSession"),),
    encoder_session=SessionClass("llama.cpp", "converters.gguf.runtimes.llama_encoder", "LlamaEncoderSession"),
    chats=(SessionClass("llama.cpp", "converters.gguf.runtimes.llama_chat", "LlamaChatSession"),),
    memory=LlamaMemory(),
    options=options.OPTIONS,
    library="gguf",
    tags=("gguf", "llama.cpp"),
)
