"""A plan's tensors to GGUF: ``model.gguf`` or its parts, and ``adapter.gguf`` where factor pairs become a LoRA.

The layout of factor pairs inside ``model.gguf`` is written down in docs/format.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.plan import Serving, TensorDecision, plan_sha256
from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Progress, ProgressCallback
from acip_export.rounding.side_by_side import side_by_side
from acip_export.version import __version__
from acip_export.weight_types import weight_type
from converters.gguf import ggml_library as ggml
from converters.gguf.architectures import Change, family_of
from converters.gguf.arrange import ADAPTER_FILE, FACTOR_SUFFIXES, Item, arrange
from converters.gguf.base_file import BaseFile, matching_change, open_base
from converters.gguf.readback import check_structure
from converters.gguf.rounding import quantize, round_trip
from converters.gguf.split import Contents, split
from converters.gguf.tokenizer import strips_after_special, tokenizer_metadata
from converters.gguf.types import FILE_TYPES
from converters.gguf.writer import (
    ALIGNMENT,
    Bytes,
    GgufWriter,
    Metadata,
    float32,
    string,
    uint32,
)

if TYPE_CHECKING:
    import torch

    from acip_export.rounding.quantizer import InputMoments
    from converters.gguf.architectures.base import Rows

__all__ = ["check_model", "convert", "imitate", "predict_files", "quantizer", "round_trip"]

# A SHA-256 in hexadecimal: predictions need only its length.
_HASH_PLACEHOLDER = "0" * 64
# Of an imitation's matrix: so many are rounded, and stand for all of them.
_IMITATED_ROWS = 8
# ggml's GGML_QNT_VERSION: the generation of block layouts.
_QUANTIZATION_VERSION = 2
# Of the layout ``factored``, docs/format.md.
FACTORED_VERSION = 1


def check_model(checkpoint: Checkpoint) -> None:
    """See :class:`acip_export.formats.protocol.ExportFormat`."""
    if open_base(checkpoint) is not None:
        return
    family = family_of(checkpoint.shape.architecture)
    family.tensor_names(checkpoint.tensors, checkpoint.shape)
    family.constants(checkpoint.config, checkpoint.shape)
    _model_keys(checkpoint)


def predict_files(
    checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving
) -> dict[str, int]:
    """See :class:`acip_export.formats.protocol.ExportFormat`."""
    del serving  # the command line carries it; the file does not
    files = _files(checkpoint, layout, tensors, _Identity(checkpoint.name, _HASH_PLACEHOLDER, _HASH_PLACEHOLDER))
    return {name: contents.nbytes for name, contents in files.items()}


def convert(model: MaterializedModel, out: Path, progress: ProgressCallback) -> None:
    """See :class:`acip_export.formats.protocol.ExportFormat`.

    Raises:
        VerificationError: a file, read back, is not what was written.
    """
    plan, checkpoint = model.plan, model.as_checkpoint()
    identity = _Identity(plan.model, plan_sha256(plan), plan.model_fingerprint)
    files = _files(checkpoint, plan.layout, plan.tensors, identity)
    every_item = [item for contents in files.values() for item in contents.items]
    for item in (item for item in every_item if item.copied is None):
        ggml.require(item.spec.type)
        if weight_type("gguf", item.spec.type).needs_importance and not _has_importance(model, item):
            raise UnsupportedError(
                f"{item.spec.name}: {item.spec.type} needs importance weights, and there are none for it; "
                "choose another type, or rank with statistics"
            )
    total = sum(item.spec.nbytes for item in every_item)
    done = 0
    changes = _Changes(model, open_base(checkpoint))
    for name, contents in files.items():
        with GgufWriter(out / name, contents.metadata, contents.specs) as writer:
            prepare = partial(_prepared, model, changes)
            for item, data in side_by_side(prepare, contents.items, lambda item: prod(item.spec.shape)):
                progress(Progress("convert", done, total, item.spec.name))
                writer.write(item.spec.name, data)
                done += item.spec.nbytes
        check_structure(out / name, contents.metadata, contents.specs)
    progress(Progress("convert", total, total))


def imitate(
    checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving, out: Path
) -> None:
    """See :class:`acip_export.formats.protocol.ExportFormat`."""
    del serving
    identity = _Identity(checkpoint.name, _HASH_PLACEHOLDER, _HASH_PLACEHOLDER)
    rows = cache(_noise)  # types of two and three bits take seconds to round the rows of every matrix
    for name, contents in _files(checkpoint, layout, tensors, identity).items():
        with GgufWriter(out / name, contents.metadata, contents.specs) as writer:
            for spec in contents.specs:
                noise = rows(spec.shape[-1], len(spec.shape) == 1, spec.type)
                writer.write(spec.name, np.resize(noise, spec.nbytes))


def _noise(columns: int, vector: bool, type: str) -> Bytes:
    """Return the bytes of some random rows, which are a matrix again and again; a vector is ones."""
    import torch

    numbers = torch.ones(1, columns) if vector else torch.randn(_IMITATED_ROWS, columns) * columns**-0.5
    return ggml.quantize(numbers, type, torch.ones(columns))


def quantizer() -> str:
    """See :class:`acip_export.formats.protocol.ExportFormat`."""
    return ggml.quantizer()


@dataclass(frozen=True)
class _Identity:
    """What a file says it was made of: the model's name, and two SHA-256."""

    model: str
    plan: str
    fingerprint: str


def _files(
    checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], identity: _Identity
) -> dict[str, Contents]:
    """Every file of the export."""
    found: dict[str, Contents] = {}
    for name, items in arrange(checkpoint, layout, tensors).items():
        contents = Contents(_metadata(name, checkpoint, items, identity), items)
        found |= {name: contents} if name == ADAPTER_FILE else split(name, contents, checkpoint)
    return found


def _metadata(file: str, checkpoint: Checkpoint, items: Sequence[Item], identity: _Identity) -> Metadata:
    shape, base = checkpoint.shape, open_base(checkpoint)
    architecture = family_of(shape.architecture).name if base is None else base.architecture
    is_adapter = file == ADAPTER_FILE
    head = {
        "general.architecture": string(architecture),
        "general.type": string("adapter" if is_adapter else "model"),
        "general.name": string(_general_name(identity.model, checkpoint.path)),
        "general.alignment": uint32(ALIGNMENT),
        "general.quantization_version": uint32(_QUANTIZATION_VERSION),
        "general.file_type": uint32(FILE_TYPES[_main_type(items)]),
        "acip.version": string(__version__),
        "acip.plan_sha256": string(identity.plan),
        "acip.model_fingerprint": string(identity.fingerprint),
    }
    if is_adapter:
        # alpha 0 is "unscaled": any other value is divided by each pair's rank.
        return {**head, "adapter.type": string("lora"), "adapter.lora.alpha": float32(0.0)}
    if base is not None:
        return base.keys(head)
    if any(item.spec.name.endswith(FACTOR_SUFFIXES) for item in items):
        head["acip.factored.version"] = uint32(FACTORED_VERSION)
    return {**head, **_model_keys(checkpoint)}


def _model_keys(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp has to know about the model and its tokenizer."""
    shape, encoder = checkpoint.shape, checkpoint.encoder
    family = family_of(shape.architecture)
    return {
        **({} if encoder is None else family.encoder_keys(encoder, checkpoint.config)),
        **family.hyperparameters(checkpoint.config, shape),
        **tokenizer_metadata(
            checkpoint.path, checkpoint.config, shape.vocabulary, checkpoint.options.get("pre_tokenizer")
        ),
    }


def _general_name(model: str, path: Path) -> str:
    """The model's name, which decides in llama.cpp whether special tokens swallow blanks: see strips_after_special."""
    says_phi3 = re.search("phi-?3", model, re.IGNORECASE)
    if strips_after_special(path):
        return model if says_phi3 else f"{model} (Phi-3)"
    return re.sub("phi-?3", "Phi 3", model, flags=re.IGNORECASE)


def _main_type(items: Sequence[Item]) -> str:
    weights: dict[str, int] = {}
    for item in items:
        weights[item.spec.type] = weights.get(item.spec.type, 0) + int(np.prod(item.spec.shape))
    return max(weights, key=lambda form: weights[form])


def _has_importance(model: MaterializedModel, item: Item) -> bool:
    if item.zero_if_missing and item.source not in model.shapes:
        return True
    return item.source is not None and model.has_importance(item.source)


class _Changes:
    """What happens to the numbers of each item; found out once for each tensor that is compared with the base file."""

    def __init__(self, model: MaterializedModel, base: BaseFile | None) -> None:
        self.model, self.base = model, base
        self._found: dict[str, Change] = {}

    def of(self, item: Item) -> Change:
        like = item.resembles
        if like is None or self.base is None:
            return item.change
        if like.weight not in self._found:
            self._found[like.weight] = matching_change(self.base, like.tensor, _whole(self.model, like.weight))
        return self._found[like.weight]


def _whole(model: MaterializedModel, weight: str) -> torch.Tensor:
    """The matrix that a weight or the parts in its place stand for, (out, in)."""
    module = weight.removesuffix(".weight")
    parts = [model.read(weight)] if weight in model.shapes else []
    if f"{module}.up.weight" in model.shapes:
        parts.append(model.read(f"{module}.up.weight") @ model.read(f"{module}.down.weight"))
    return sum(parts[1:], parts[0])


def _prepared(model: MaterializedModel, changes: _Changes, item: Item) -> Callable[[], Bytes]:
    """Read what an item is made of; what is returned makes its bytes."""
    import torch

    if item.copied is not None:
        assert changes.base is not None
        return partial(changes.base.read, item.copied)
    if item.constant is not None:
        return partial(ggml.quantize, torch.from_numpy(item.constant), item.spec.type)
    assert item.source is not None
    if item.zero_if_missing and item.source not in model.shapes:
        # Every block format reads zero bytes as zeros: the scale is zero.
        zeros = np.zeros(item.spec.nbytes, np.uint8)
        return lambda: zeros
    change, inputs = changes.of(item), model.inputs(item.source)
    # Rounded in the order of the model: rows may make up for each other.
    return partial(_finished, change.of_numbers(model.read(item.source)), item.spec.type, inputs, change.rows)


def _finished(numbers: torch.Tensor, type: str, inputs: InputMoments, rows: Rows | None) -> Bytes:
    data = quantize(numbers, type, inputs)
    return data if rows is None else data.reshape(len(numbers), -1)[rows].reshape(-1)
