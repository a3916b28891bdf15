"""``tuned.safetensors``: what tuning made of an export's scales, vectors and pairs. See docs/tuned-numbers.md.

The scales of a tensor's blocks are multiplied by gains, ``gains of NAME`` (rows, blocks) float16; a vector is replaced
by ``NAME``, float32, and the factors of a pair, which are rounded then, by ``NAME``, float16. The file lies in the
export that was written from it, because verifying that needs it; no device does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.artifacts.materialized import stored_tensors
from acip_export.artifacts.names import TUNED, TUNED_FILE
from acip_export.artifacts.plan import Plan, plan_sha256
from acip_export.errors import TunedFileError
from acip_export.finite import is_finite
from acip_export.io.atomic import new_file, read_safetensors_header
from acip_export.io.inputs import decode_json
from acip_export.units import ceil_div
from acip_export.weight_types import weight_type

if TYPE_CHECKING:
    from torch import Tensor

_GAINS = "gains of "
# A gain beyond this was not found by tuning: steps are a twentieth of a per cent.
_LARGEST_GAIN = 16.0


@dataclass(frozen=True)
class TuningResult:
    """What tuning took and gave.

    Attributes:
        steps: of gradient descent, on ``tokens`` of text in all. seconds: that they took.
        before, after: divergence from the dense model on held-out text, nats per token.
    """

    steps: int
    tokens: int
    seconds: float
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether the export has the tuned numbers: what does not help is left out."""
        return self.after < self.before

    def __str__(self) -> str:
        change = f"KL {self.before:.4f} to {self.after:.4f} on held-out text"
        if self.kept:
            return f"tuned in {self.steps} steps, {self.seconds:.0f} s: {change}"
        return f"{self.steps} steps of tuning, {self.seconds:.0f} s, did not help and are left out: {change}"


@dataclass(frozen=True, eq=False)
class Tuned:
    """Tuned numbers of one plan.

    Attributes:
        gains: by name of the matrix, (rows, blocks). vectors: by name, float32. factors: of pairs before rounding, by
            the names that exports store them under, float16.
    """

    result: TuningResult
    gains: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]


def save_tuned(tuned: Tuned, plan: Plan, file: Path) -> None:
    """Write the numbers, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"{_GAINS}{name}": gains for name, gains in tuned.gains.items()} | {**tuned.vectors, **tuned.factors}
    metadata = {
        "artifact": TUNED.artifact,
        "version": str(TUNED.version),
        "plan_sha256": plan_sha256(plan),
        "result": json.dumps(asdict(tuned.result)),
    }
    with new_file(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def load_tuned(export: Path, plan: Plan) -> Tuned | None:
    """Read what an export was tuned to; ``None``: its plan asks for no tuning.

    Raises:
        TunedFileError: the file is missing, damaged, of another version, or of another plan.
    """
    if plan.tune_seconds is None:
        return None
    file = export / TUNED_FILE
    if not file.is_file():
        raise TunedFileError(f"{export} was tuned, and {TUNED_FILE} is missing from it; bring it back, or export again")
    entries, metadata = read_safetensors_header(file, TunedFileError)
    found = metadata.get("artifact"), metadata.get("version")
    if found != (TUNED.artifact, str(TUNED.version)):
        raise TunedFileError(f"{file} is not {TUNED.noun} of version {TUNED.version}; {TUNED.remedy}")
    if metadata.get("plan_sha256") != plan_sha256(plan):
        raise TunedFileError(f"{file} is of another plan than {export}; {TUNED.remedy}")
    result = decode_json(metadata.get("result", "").encode(), TuningResult, f"{file}: result", TunedFileError)
    expected, pairs = _shapes(plan), _pair_shapes(plan)
    absent = next((name for name in pairs if name not in entries), None)
    if absent is not None and result.kept:
        raise TunedFileError(f"{file}: {absent!r} is missing; {TUNED.remedy}")
    if entries and not result.kept:
        raise TunedFileError(f"{file} says that tuning did not help, and has numbers; {TUNED.remedy}")
    for name, entry in entries.items():
        if expected.get(name) != (entry.shape, entry.dtype):
            raise TunedFileError(f"{file}: {name!r} of shape {entry.shape} and dtype {entry.dtype} is not of this plan")
    from safetensors.torch import load_file

    tensors = load_file(file)
    for name, tensor in tensors.items():
        if not is_finite(tensor) or (name.startswith(_GAINS) and tensor.abs().max() > _LARGEST_GAIN):
            raise TunedFileError(f"{file}: {name!r} has numbers that no tuning makes; {TUNED.remedy}")
    gains = {name.removeprefix(_GAINS): each for name, each in tensors.items() if name.startswith(_GAINS)}
    others = {name: each for name, each in tensors.items() if not name.startswith(_GAINS)}
    return Tuned(
        result,
        gains,
        {name: each for name, each in others.items() if each.ndim == 1},
        {name: each for name, each in others.items() if each.ndim == 2},
    )


def _pair_shapes(plan: Plan) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of the factors that are tuned."""
    pairs = [decision for decision in plan.tensors if decision.kept is not None]
    stored = [stored_tensors(pair.name, pair.shape, pair.rank) for pair in pairs]
    return {name: (shape, "F16") for shapes in stored for name, shape in shapes.items()}


def _shapes(plan: Plan) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of everything that can be tuned."""
    found = _pair_shapes(plan)
    for decision in plan.tensors:
        if len(decision.shape) == 1:
            found[decision.name] = decision.shape, "F32"
        elif decision.representation == "dense":
            blocks = ceil_div(decision.shape[1], weight_type(plan.format, decision.type or "").block)
            found[f"{_GAINS}{decision.name}"] = (decision.shape[0], blocks), "F16"
    return found
