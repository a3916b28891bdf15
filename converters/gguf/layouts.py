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
    model: list[Item] = []
    adapter: list[Item] = []
    for decision in tensors:
        if decision.name not in names:  # a buffer that the runtime computes for itself
            continue
        if decision.representation not in ("dense", low_rank):
            raise UnsupportedError(
                f"{decision.name} is {decision.representation}, which the layout {layout!r} of GGUF cannot hold; "
                "plan again for this layout"
            )
        _check(decision, names[decision.name], checkpoint)
        base, pair = _items(decision, names[decision.name], family, checkpoint)
        model.append(base)
        adapter += pair
    for name, numbers in family.constants(checkpoint.config, checkpoint.shape).items():
        model.append(Item(TensorSpec(name, numbers.shape, "f32"), None, numbers))
    files = {MODEL_FILE: tuple(model)}
    if adapter:
        files[ADAPTER_FILE] = tuple(adapter)
    return files


def _items(
    decision: TensorDecision, name: str, family: Family, checkpoint: Checkpoint
) -> tuple[Item, tuple[Item, ...]]:
    change = family.change(name, checkpoint.config, checkpoint.shape)
    assert decision.format is not None  # _check has seen to it
    spec = TensorSpec(name, decision.shape, decision.format)
    if decision.rank is None:
        return Item(spec, decision.name, change=change), ()
    (up, up_shape), (down, down_shape) = stored_tensors(decision.name, decision.shape, decision.rank).items()
    assert decision.up_format is not None and decision.down_format is not None
    pair = (
        Item(TensorSpec(f"{name}.lora_a", down_shape, decision.down_format), down),
        Item(TensorSpec(f"{name}.lora_b", up_shape, decision.up_format), up, change=change),
    )
    return Item(spec, decision.name, change=change, zero_if_missing=True), pair


def _check(decision: TensorDecision, name: str, checkpoint: Checkpoint) -> None:
    formats = [(decision.format, decision.shape[-1])]
    if decision.representation == "adapter":
        if name in ("token_embd.weight", "output.weight") or len(decision.shape) != 2:
            raise UnsupportedError(f"{decision.name} cannot be a base with an adapter in llama.cpp; keep it dense")
        formats += [(decision.down_format, decision.shape[1]), (decision.up_format, decision.rank or 0)]
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
    if name == "token_embd.weight" and decision.shape[0] != checkpoint.shape.vocabulary:
        raise UnsupportedError(
            f"{decision.name} has {decision.shape[0]} rows, config.json names {checkpoint.shape.vocabulary} tokens"
        )
