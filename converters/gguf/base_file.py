"""``--base-gguf``: metadata, tokenizer and whatever is not planned come from a file of llama.cpp's own converter.

For architectures that have no file in ``architectures/``. How the converter changed a tensor on its way is not known
here, so it is found out: of the ways that there are, the one after which the model's numbers look like the base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import MissingExtraError, ModelFileError, UnsupportedError
from acip_export.inspection.gguf import GgufHead, PlacedTensor
from acip_export.inspection.gguf_split import SPLIT_KEYS, PartName, part_names, read_parts
from acip_export.io.stamps import Stamp, stamp_of
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import layer_of
from acip_export.weight_types import types_of
from converters.gguf import ggml_library as ggml
from converters.gguf.architectures.base import Change, interleaved_rows, some
from converters.gguf.writer import Bytes, TensorSpec, Value

if TYPE_CHECKING:
    import torch

# Cosine of the angle between a tensor and the base's. A low-rank copy that keeps a tenth of the energy has 0.3; those
# of different models, or in the wrong order, have none.
_SAME_MODEL = 0.3
_OWN_KEYS = ("general.alignment", "general.quantization_version", "general.file_type")


@dataclass(frozen=True)
class BaseFile:
    """An opened base GGUF; holds no numbers.

    Attributes:
        path: of the file, or of the first of its parts. head: of that one, with the tensors of all parts.
        files: where each tensor is.
    """

    path: Path
    head: GgufHead
    files: Mapping[str, Path]

    @property
    def architecture(self) -> str:
        return str(self.head.values.get("general.architecture"))

    def keys(self, own: Mapping[str, Value]) -> dict[str, Value]:
        """The base's metadata, ``own`` in place of the keys that describe the file and after the rest."""
        ours = {key for key in own if key.startswith("acip.") or key in _OWN_KEYS}
        kept = {key: Value(data) for key, data in self.head.encoded.items() if key not in ours | {*SPLIT_KEYS}}
        return {**kept, **{key: value for key, value in own.items() if key not in kept}}

    def spec(self, tensor: PlacedTensor) -> TensorSpec:
        return TensorSpec(tensor.name, tensor.shape, tensor.type_name)

    def read(self, tensor: PlacedTensor) -> Bytes:
        """The tensor's bytes as they are."""
        data: Bytes = np.fromfile(self.files[tensor.name], np.uint8, tensor.nbytes, offset=tensor.begin)
        return data

    def number(self, key: str) -> int:
        found = self.head.values.get(f"{self.architecture}.{key}")
        return found if isinstance(found, int) else 0


def open_base(checkpoint: Checkpoint) -> BaseFile | None:
    """The base that the user named, or ``None``.

    Raises:
        ModelFileError: damaged, without one of its parts, or of a model of other sizes.
        UnsupportedError: it holds types that this tool does not write.
    """
    name = checkpoint.options.get("base_gguf")
    if name is None:
        return None
    file = Path(name)
    if not file.is_file():
        raise ModelFileError(f"{file} does not exist; it was named by --base-gguf")
    part = PartName.parse(file.name)
    names = (file.name,) if part is None else part_names(f"{part.stem}.gguf", part.count)
    base = _open(file, tuple(map(stamp_of, map(file.with_name, names))))
    shape = checkpoint.shape
    for key, expected in (("block_count", shape.layers), ("embedding_length", shape.hidden)):
        if base.number(key) != expected:
            raise ModelFileError(
                f"{file} is of another model: its {key} is {base.number(key)}, the model's is {expected}"
            )
    return base


@lru_cache(maxsize=2)
def _open(file: Path, _state: tuple[Stamp | None, ...]) -> BaseFile:
    known = {form.name for form in types_of("gguf")}
    parts = read_parts(file)
    for tensor in (tensor for part in parts for tensor in part.head.tensors):
        if tensor.type_name not in known:
            raise UnsupportedError(
                f"{file} has {tensor.name} as {tensor.type_name}; convert the base with  --outtype f16"
            )
    head = replace(parts[0].head, tensors=tuple(tensor for part in parts for tensor in part.head.tensors))
    return BaseFile(file, head, {tensor.name: part.file for part in parts for tensor in part.head.tensors})


def planned_names(base: BaseFile, checkpoint: Checkpoint, tensors: Sequence[TensorDecision]) -> dict[str, str]:
    """``{Hugging Face name: name in the base}`` of the matrices that the plan decides and the base has.

    Raises:
        UnsupportedError: a matrix inside the layers that the base does not have under its usual name.
        ModelFileError: one of another shape.
        MissingExtraError: gguf is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "writing GGUF") from None

    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if base.architecture not in architectures:
        raise UnsupportedError(
            f"{base.path} is a {base.architecture!r}, which the installed gguf package does not know"
        )
    table = gguf.get_tensor_name_map(architectures[base.architecture], checkpoint.shape.layers)
    shapes = {tensor.name: tensor.shape for tensor in base.head.tensors}
    found: dict[str, str] = {}
    lost: list[str] = []
    for decision in tensors:
        if len(decision.shape) != 2:
            continue
        name = table.get_name(decision.name, try_suffixes=(".weight",))
        if name not in shapes:
            lost += [decision.name] if layer_of(decision.name) is not None else []
        elif shapes[name] != decision.shape:
            raise ModelFileError(
                f"{base.path} is of another model: {name} is {shapes[name]}, {decision.name} is {decision.shape}"
            )
        else:
            found[decision.name] = name
    if lost or not found:
        others = sorted(shapes.keys() - found.values())
        raise UnsupportedError(
            f"{base.path} does not have the plan's matrices under llama.cpp's names for {base.architecture!r}: "
            f"nothing for {some(lost)}; nothing of the plan for {some(others)}"
        )
    return found


def matching_change(base: BaseFile, tensor: PlacedTensor, weight: torch.Tensor) -> Change:
    """How the converter of the base changed ``weight``, the whole matrix of the model (out, in).

    Raises:
        ModelFileError: in none of the known ways: the base is of another model.
    """
    expected = ggml.dequantize(base.read(tensor), tensor.shape, tensor.type_name)
    changes = [Change()]
    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(tensor.name.split(".")[-2])
    count = base.number(heads) if heads else 0
    if count and tensor.shape[0] % (2 * count) == 0:
        changes.append(Change(interleaved_rows(count, tensor.shape[0] // count)))
    likeness = [_cosine(change.apply(weight).float().numpy(), expected) for change in changes]
    best = int(np.argmax(likeness))
    if likeness[best] < _SAME_MODEL:
        raise ModelFileError(
            f"{base.path} is of another model: its {tensor.name} has nothing in common with this model's "
            f"(cosine {likeness[best]:.3f})"
        )
    return changes[best]


def _cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    a, b = a.ravel(), b.ravel()
    return float(a @ b) / (float(np.linalg.norm(a)) * float(np.linalg.norm(b)) or 1.0)
