"""llama.cpp's importance matrices (``imatrix``) in their GGUF form: written from measured moments, read in their place.

For every matrix ``NAME`` of the model two float32 tensors: ``NAME.in_sum2`` (1, in), the sum of the squared inputs over
all tokens, and ``NAME.counts`` (1, 1), how many tokens. Their quotient is what a score file calls ``input_moment``.
Source: llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import ImatrixError, ModelFileError
from acip_export.inspection.gguf import MAGIC, PlacedTensor, read_head
from acip_export.io.inputs import open_input
from acip_export.io.outputs import FileKind, claim_output
from acip_export.model.checkpoint import Checkpoint
from acip_export.units import ceil_div
from converters.gguf.architectures import family_of
from converters.gguf.architectures.base import TOKEN_EMBEDDING, some
from converters.gguf.base_file import open_base, planned_names
from converters.gguf.ggml_library import Floats
from converters.gguf.readback import check_structure
from converters.gguf.writer import GgufWriter, Metadata, TensorSpec, string, strings, uint32

# llama-imatrix does not write this key: a matrix that it measured for hours is told from ours by it.
_WRITER = "acip-export imatrix"
IMATRIX_KIND = FileKind(
    "an importance matrix", re.compile(rb"(?s)GGUF.*general\.quantized_by.{12}%b" % _WRITER.encode())
)
_SUMS, _COUNTS = ".in_sum2", ".counts"
# What llama-imatrix may have besides the layers' (--process-output): read from the embedding where both are tied.
_OUTER = {"output.weight", TOKEN_EMBEDDING}


@dataclass(frozen=True)
class Measured:
    """What importance was measured on.

    Attributes:
        source: of the text. tokens: how many, above zero. chunk: tokens of a sequence.
    """

    source: str
    tokens: int
    chunk: int


def write_imatrix(
    checkpoint: Checkpoint, moments: Mapping[str, Floats], measured: Measured, out: Path, force: bool = False
) -> int:
    """Write an imatrix that llama-quantize takes; returns how many matrices it has.

    Args:
        moments: (in,) float32 mean squares of the inputs of every linear module, by its Hugging Face name.

    Raises:
        UsageError: ``out`` may not be written; see :func:`acip_export.io.outputs.claim_output`.
        UnsupportedError: an architecture whose tensors have no known names in llama.cpp.
    """
    names = _gguf_names(checkpoint)
    numbers: dict[str, Floats] = {}
    for module in checkpoint.linear_modules:
        name = names[f"{module}.weight"]
        numbers[name + _SUMS] = (moments[module] * np.float32(measured.tokens)).reshape(1, -1)
        numbers[name + _COUNTS] = np.full((1, 1), measured.tokens, np.float32)
    metadata: Metadata = {
        "general.type": string("imatrix"),
        "general.quantized_by": string(_WRITER),
        "imatrix.datasets": strings([measured.source]),
        "imatrix.chunk_count": uint32(ceil_div(measured.tokens, measured.chunk)),
        "imatrix.chunk_size": uint32(measured.chunk),
    }
    specs = [TensorSpec(name, values.shape, "f32") for name, values in numbers.items()]
    with claim_output(out, IMATRIX_KIND, force, base=checkpoint.path).new_file() as temporary:
        with GgufWriter(temporary, metadata, specs) as writer:
            for name, values in numbers.items():
                writer.write(name, values.view(np.uint8))
        check_structure(temporary, metadata, specs)
    return len(specs) // 2


def read_imatrix(file: Path) -> dict[str, Floats]:
    """Mean squares of the inputs, (in,) float32, of every matrix of an imatrix, by its GGUF name.

    Those of several experts are (experts, in) matrices in the file, and refused: no supported family has them.

    Raises:
        ImatrixError: missing, damaged, no imatrix, or in the older form.
    """
    try:
        head = read_head(file)
    except ModelFileError as error:
        if not file.is_file():
            raise ImatrixError(f"{file} does not exist; it was named by --imatrix") from None
        older = "it may be one in the form before GGUF; convert it with  llama-imatrix --in-file OLD -o NEW.gguf"
        raise ImatrixError(f"{error}; {older}" if _has_no_magic(file) else str(error)) from error
    if head.values.get("general.type") != "imatrix":
        found = head.values.get("general.type", "a file without general.type")
        raise ImatrixError(f"{file} is no imatrix but {found!r}; llama-imatrix or  acip-export imatrix  makes one")
    tensors = {tensor.name: tensor for tensor in head.tensors}
    matrices = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    counted = {name.removesuffix(_COUNTS) for name in tensors if name.endswith(_COUNTS)}
    if not matrices or set(matrices) != counted:
        raise ImatrixError(
            f"{file} is damaged: {len(matrices)} sums and {len(counted)} counts, "
            f"alone: {some(sorted(counted ^ set(matrices)))}"
        )
    return {name: _mean(file, tensors[name + _SUMS], tensors[name + _COUNTS], name) for name in matrices}


def _has_no_magic(file: Path) -> bool:
    with open_input(file, ImatrixError) as stream:
        return stream.read(len(MAGIC)) != MAGIC


def _mean(file: Path, sums: PlacedTensor, counts: PlacedTensor, name: str) -> Floats:
    if (
        (sums.type_name, counts.type_name) != ("f32", "f32")
        or counts.shape != (1, 1)
        or sums.shape[:-1] not in ((1,), ())
    ):
        raise ImatrixError(
            f"{file}: {name} has sums {sums.shape} {sums.type_name} and counts {counts.shape} {counts.type_name}; "
            "expected (1, columns) and (1, 1), f32"
        )
    values, (count,) = (np.fromfile(file, "<f4", tensor.nbytes // 4, offset=tensor.begin) for tensor in (sums, counts))
    if not np.isfinite(values).all() or not np.isfinite(count) or (values < 0).any() or count < 0:
        raise ImatrixError(f"{file} is damaged: {name} has sums or counts that are negative or not finite")
    # As llama-quantize: what was never reached is rounded without weights.
    mean: Floats = values / count if count > 0 else np.ones_like(values)
    return mean


def importance_of(checkpoint: Checkpoint, file: Path) -> dict[str, Floats]:
    """(in,) float32 mean squares of the inputs of every linear module, by its Hugging Face name, from an imatrix.

    Raises:
        ImatrixError: as :func:`read_imatrix`, or of another model.
        UnsupportedError: an architecture whose tensors have no known names in llama.cpp.
    """
    found, names = read_imatrix(file), _gguf_names(checkpoint)
    modules = {module: names[f"{module}.weight"] for module in checkpoint.linear_modules if f"{module}.weight" in names}
    missing = sorted(set(modules.values()) - found.keys())
    unknown = sorted(found.keys() - set(names.values()) - _OUTER)
    if missing or unknown:
        raise ImatrixError(
            f"{file} is of another model, or was not measured on all of it: "
            f"nothing for {some(missing)}; not in {checkpoint.name}: {some(unknown)}"
        )
    for module, name in modules.items():
        columns = checkpoint.linear_modules[module][1]
        if len(found[name]) != columns:
            raise ImatrixError(
                f"{file} is of another model: its {name} has {len(found[name])} columns, the model's has {columns}"
            )
    return {module: found[name] for module, name in modules.items()}


def _gguf_names(checkpoint: Checkpoint) -> Mapping[str, str]:
    base = open_base(checkpoint)
    if base is None:
        return family_of(checkpoint.shape.architecture).tensor_names(checkpoint.tensors, checkpoint.shape)
    matrices = [
        TensorDecision(name, info.shape, "dense", 0, "f32")
        for name, info in checkpoint.tensors.items()
        if len(info.shape) == 2
    ]
    return planned_names(base, checkpoint, matrices)
