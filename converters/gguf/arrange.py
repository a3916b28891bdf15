"""From decisions to the tensors of each file: names, shapes, formats, order, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.materialized import stored_tensors
from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UnsupportedError
from acip_export.inspection.gguf import PlacedTensor
from acip_export.inspection.gguf_split import files_of
from acip_export.model.checkpoint import Checkpoint
from acip_export.weight_types import weight_type
from converters.gguf.architectures import FAMILIES, Change, family_of
from converters.gguf.architectures.base import TOKEN_EMBEDDING
from converters.gguf.base_file import BaseFile, open_base, planned_names
from converters.gguf.layouts import low_rank_of
from converters.gguf.writer import TensorSpec

MODEL_FILE = "model.gguf"
ADAPTER_FILE = "adapter.gguf"
# First factor ``down`` (rank, in), second factor ``up`` (out, rank): the names of a LoRA's tensors.
FACTOR_SUFFIXES = (".lora_a", ".lora_b")
# An encoder's: llama.cpp adds their rows to the stream as they are.
_FLOAT_TABLES = ("position_embd.weight", "token_types.weight")


def model_files(names: Iterable[str]) -> tuple[str, ...]:
    """Those of an export's files that the model is in, in their order: one, or the parts of ``--split-max-size``."""
    return files_of(MODEL_FILE, names)


def model_file(export: Path) -> Path:
    """What a runtime is told to open: the model's file, or the first of its parts. It may be missing."""
    names = [file.name for file in export.iterdir()] if export.is_dir() else []
    return export / next(iter(model_files(names)), MODEL_FILE)


@dataclass(frozen=True)
class Resemblance:
    """A tensor of the base file, and the Hugging Face name of the same matrix."""

    tensor: PlacedTensor
    weight: str


@dataclass(frozen=True)
class Item:
    """One tensor of a file.

    Attributes:
        source: its name in the materialized model; ``None`` for a constant.
        constant: the numbers that no model holds.
        change: what happens to the source's numbers on their way.
        zero_if_missing: an adapter's base: all zero when the model has no such tensor.
        copied: a tensor of the base file that is taken as it is.
        resembles: what tells the change, where the architecture is known from a base file only.
    """

    spec: TensorSpec
    source: str | None
    constant: npt.NDArray[np.float32] | None = None
    change: Change = Change()  # noqa: RUF009 - frozen
    zero_if_missing: bool = False
    copied: PlacedTensor | None = None
    resembles: Resemblance | None = None


def arrange(checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...]) -> dict[str, tuple[Item, ...]]:
    """The contents of model and adapter, in the order of ``tensors``. The adapter exists only if it has tensors.

    Which tensors of the model are in which part is :mod:`converters.gguf.split`'s to say.

    Raises:
        UnsupportedError: the layout, the architecture or a decision cannot be expressed.
    """
    low_rank = low_rank_of(layout)
    base = open_base(checkpoint)
    if base is not None:
        return _arrange_on(base, checkpoint, layout, tensors)
    family = family_of(checkpoint.shape.architecture)
    names = family.tensor_names((d.name for d in tensors), checkpoint.shape)
    if low_rank is not None and not checkpoint.shape.generates:
        raise UnsupportedError(f"encoders are written as GGUF with  --layout stock  only, not {layout}")
    if low_rank == "factored" and not family.factor_pairs:
        raise UnsupportedError(
            f"llama.cpp's {family.name!r} has not been seen to run factor pairs; choose  --layout stock.  "
            f"Tested: {', '.join(sorted(known.name for known in FAMILIES if known.factor_pairs))}"
        )
    model: list[Item] = []
    adapter: list[Item] = []
    for decision in tensors:
        if decision.name not in names:  # a buffer that the runtime computes for itself
            continue
        _check(decision, names[decision.name], checkpoint, layout)
        change = family.change(names[decision.name], checkpoint.config, checkpoint.shape)
        whole, pair = _items(decision, names[decision.name], change, None)
        model += whole
        (adapter if low_rank == "lora" else model).extend(pair)
    for name, numbers in family.constants(checkpoint.config, checkpoint.shape).items():
        model.append(Item(TensorSpec(name, numbers.shape, "f32"), None, numbers))
    return _files(model, adapter)


def _arrange_on(
    base: BaseFile, checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...]
) -> dict[str, tuple[Item, ...]]:
    """The base's tensors in their order, those of the plan in place of theirs."""
    if low_rank_of(layout) == "factored":
        raise UnsupportedError("--base-gguf is for the layouts stock and adapter; choose  --layout stock")
    names = planned_names(base, checkpoint, tensors)
    decisions = {names[decision.name]: decision for decision in tensors if decision.name in names}
    model: list[Item] = []
    adapter: list[Item] = []
    for tensor in base.head.tensors:
        decision = decisions.get(tensor.name)
        if decision is None:
            model.append(Item(base.spec(tensor), None, copied=tensor))
            continue
        _check(decision, tensor.name, checkpoint, layout)
        whole, pair = _items(decision, tensor.name, Change(), Resemblance(tensor, decision.name))
        model += whole
        adapter += pair
    return _files(model, adapter)


def _files(model: list[Item], adapter: list[Item]) -> dict[str, tuple[Item, ...]]:
    files = {MODEL_FILE: tuple(model)}
    if adapter:
        files[ADAPTER_FILE] = tuple(adapter)
    return files


def _items(
    decision: TensorDecision, name: str, change: Change, like: Resemblance | None
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """What stands for the whole matrix (nothing, if its factors do), and its factor pair."""
    whole: tuple[Item, ...] = ()
    if decision.type is not None:
        spec = TensorSpec(name, decision.shape, decision.type)
        zero = decision.representation == "lora"
        whole = (Item(spec, decision.name, change=change, zero_if_missing=zero, resembles=like),)
    if decision.rank is None:
        return whole, ()
    (up, up_shape), (down, down_shape) = stored_tensors(decision.name, decision.shape, decision.rank).items()
    assert decision.up_type is not None and decision.down_type is not None
    pair = (
        Item(TensorSpec(name + FACTOR_SUFFIXES[0], down_shape, decision.down_type), down),
        Item(TensorSpec(name + FACTOR_SUFFIXES[1], up_shape, decision.up_type), up, change=change, resembles=like),
    )
    return whole, pair


def _check(decision: TensorDecision, name: str, checkpoint: Checkpoint, layout: str) -> None:
    low_rank = low_rank_of(layout)
    corrected = low_rank == "lora" and decision.representation == "residual"
    if decision.representation not in ("dense", low_rank) and not corrected:
        raise UnsupportedError(
            f"{decision.name} is {decision.representation}, which the layout {layout!r} of GGUF cannot hold; "
            "plan again for this layout"
        )
    formats = [(decision.type, decision.shape[-1])] if decision.representation != "factored" else []
    if decision.representation != "dense":
        # The embedding is looked up, never multiplied by. The head can be factored, but no LoRA is put on it.
        whole_only = (TOKEN_EMBEDDING,) + (
            ("output.weight",) if decision.representation in ("lora", "residual") else ()
        )
        if name in whole_only or len(decision.shape) != 2:
            raise UnsupportedError(f"{decision.name} cannot be {decision.representation} in llama.cpp; keep it dense")
        formats += [(decision.down_type, decision.shape[1]), (decision.up_type, decision.rank or 0)]
    if decision.representation == "factored" and (decision.rank or 0) >= decision.shape[0]:
        raise UnsupportedError(
            f"{decision.name}: rank {decision.rank} is not below its {decision.shape[0]} rows; keep it dense"
        )
    for form, columns in formats:
        try:
            fits = weight_type("gguf", form or "none").fits(columns)
        except KeyError:
            raise UnsupportedError(f"{decision.name}: GGUF has no type {form!r}") from None
        if not fits:
            raise UnsupportedError(
                f"{decision.name}: rows of {columns} weights do not fit {form} blocks of "
                f"{weight_type('gguf', form or 'none').block}; choose a type with smaller blocks"
            )
    if len(decision.shape) == 1 and decision.type != "f32":
        raise UnsupportedError(f"{decision.name}: llama.cpp needs vectors in f32, the plan has {decision.type}")
    if name in _FLOAT_TABLES and decision.type != "f32":
        raise UnsupportedError(f"{decision.name}: llama.cpp needs this table in f32, the plan has {decision.type}")
    if name == TOKEN_EMBEDDING and decision.shape[0] != checkpoint.shape.vocabulary:
        raise UnsupportedError(
            f"{decision.name} has {decision.shape[0]} rows, config.json names {checkpoint.shape.vocabulary} tokens"
        )
