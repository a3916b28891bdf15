"""From decisions to the tensors of each file: names, shapes, formats, order, and where the numbers come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from acip_export.bundle import stored_tensors
from acip_export.checkpoint import Checkpoint
from acip_export.errors import UnsupportedError
from acip_export.formats import weight_format
from acip_export.plans import TensorDecision
from acip_export.targets import TARGETS
from converters.gguf.architectures import Change, Family, family_of
from converters.gguf.writer import TensorSpec

MODEL_FILE = "model.gguf"
ADAPTER_FILE = "adapter.gguf"
# First factor ``down`` (rank, in), second factor ``up`` (out, rank): the names of a LoRA's tensors.
FACTOR_SUFFIXES = (".lora_a", ".lora_b")
# Those whose factor pairs the tests run with the extension. Others may multiply by a weight behind its back.
FACTORED_ARCHITECTURES = (
    "gemma",
    "gemma2",
    "gemma3",
    "granite",
    "llama",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
# An encoder's: llama.cpp adds their rows to the stream as they are.
_FLOAT_TABLES = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True)
class Item:
    """One tensor of a file.

    Attributes:
        source: its name in the bundle; ``None`` for a constant.
        constant: the numbers that no bundle holds.
        change: what happens to the source's numbers on their way.
        zero_if_missing: an adapter's base: all zero when the bundle has no such tensor.
    """

    spec: TensorSpec
    source: str | None
    constant: npt.NDArray[np.float32] | None = None
    change: Change = Change()  # noqa: RUF009 - frozen
    zero_if_missing: bool = False


def arrange(checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...]) -> dict[str, tuple[Item, ...]]:
    """The contents of every file, in the order of ``tensors``. The adapter's file exists only if it has tensors.

    Raises:
        UnsupportedError: the layout, the architecture or a decision cannot be expressed.
    """
    low_rank = TARGETS["gguf"].layout(layout).low_rank
    family = family_of(checkpoint.shape.architecture)
    names = family.tensor_names((d.name for d in tensors), checkpoint.shape)
    if low_rank is not None and not checkpoint.shape.generates:
        raise UnsupportedError(f"encoders are written as GGUF with  --layout stock  only, not {layout}")
    if low_rank == "factored" and family.name not in FACTORED_ARCHITECTURES:
        raise UnsupportedError(
            f"llama.cpp's {family.name!r} has not been seen to run factor pairs; choose  --layout stock.  "
            f"Tested: {', '.join(FACTORED_ARCHITECTURES)}"
        )
    model: list[Item] = []
    adapter: list[Item] = []
    for decision in tensors:
        if decision.name not in names:  # a buffer that the runtime computes for itself
            continue
        corrected = low_rank == "adapter" and decision.representation == "residual"
        if decision.representation not in ("dense", low_rank) and not corrected:
            raise UnsupportedError(
                f"{decision.name} is {decision.representation}, which the layout {layout!r} of GGUF cannot hold; "
                "plan again for this layout"
            )
        _check(decision, names[decision.name], checkpoint)
        whole, pair = _items(decision, names[decision.name], family, checkpoint)
        model += whole
        (adapter if low_rank == "adapter" else model).extend(pair)
    for name, numbers in family.constants(checkpoint.config, checkpoint.shape).items():
        model.append(Item(TensorSpec(name, numbers.shape, "f32"), None, numbers))
    files = {MODEL_FILE: tuple(model)}
    if adapter:
        files[ADAPTER_FILE] = tuple(adapter)
    return files


def _items(
    decision: TensorDecision, name: str, family: Family, checkpoint: Checkpoint
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """What stands for the whole matrix (nothing, if its factors do), and its factor pair."""
    change = family.change(name, checkpoint.config, checkpoint.shape)
    whole: tuple[Item, ...] = ()
    if decision.format is not None:
        spec = TensorSpec(name, decision.shape, decision.format)
        whole = (Item(spec, decision.name, change=change, zero_if_missing=decision.representation == "adapter"),)
    if decision.rank is None:
        return whole, ()
    (up, up_shape), (down, down_shape) = stored_tensors(decision.name, decision.shape, decision.rank).items()
    assert decision.up_format is not None and decision.down_format is not None
    pair = (
        Item(TensorSpec(name + FACTOR_SUFFIXES[0], down_shape, decision.down_format), down),
        Item(TensorSpec(name + FACTOR_SUFFIXES[1], up_shape, decision.up_format), up, change=change),
    )
    return whole, pair


def _check(decision: TensorDecision, name: str, checkpoint: Checkpoint) -> None:
    formats = [(decision.format, decision.shape[-1])] if decision.representation != "factored" else []
    if decision.representation != "dense":
        # The embedding is looked up, never multiplied by. The head can be factored, but no LoRA is put on it.
        whole_only = ("token_embd.weight",) + (
            ("output.weight",) if decision.representation in ("adapter", "residual") else ()
        )
        if name in whole_only or len(decision.shape) != 2:
            raise UnsupportedError(f"{decision.name} cannot be {decision.representation} in llama.cpp; keep it dense")
        formats += [(decision.down_format, decision.shape[1]), (decision.up_format, decision.rank or 0)]
    if decision.representation == "factored" and (decision.rank or 0) >= decision.shape[0]:
        raise UnsupportedError(
            f"{decision.name}: rank {decision.rank} is not below its {decision.shape[0]} rows; keep it dense"
        )
    for form, columns in formats:
        try:
            fits = weight_format("gguf", form or "none").fits(columns)
        except KeyError:
            raise UnsupportedError(f"{decision.name}: GGUF has no type {form!r}") from None
        if not fits:
            raise UnsupportedError(
                f"{decision.name}: rows of {columns} weights do not fit {form} blocks of "
                f"{weight_format('gguf', form or 'none').block}; choose a type with smaller blocks"
            )
    if len(decision.shape) == 1 and decision.format != "f32":
        raise UnsupportedError(f"{decision.name}: llama.cpp needs vectors in f32, the plan has {decision.format}")
    if name in _FLOAT_TABLES and decision.format != "f32":
        raise UnsupportedError(f"{decision.name}: llama.cpp needs this table in f32, the plan has {decision.format}")
    if name == "token_embd.weight" and decision.shape[0] != checkpoint.shape.vocabulary:
        raise UnsupportedError(
            f"{decision.name} has {decision.shape[0]} rows, config.json names {checkpoint.shape.vocabulary} tokens"
        )
