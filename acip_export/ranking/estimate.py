"""Compute time, memory and disk of a ranking from the sizes of a model, before any weight is read.

Time is counted in floating point operations and divided by what this machine was measured to do in a second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from acip_export.errors import CheckpointError
from acip_export.io.atomic import read_json_object
from acip_export.machine import Machine
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_info import TensorInfo
from acip_export.model.torch_model import expected_parameters
from acip_export.ranking.acip_defaults import mask_steps_of
from acip_export.ranking.algorithm import Algorithm
from acip_export.ranking.config import AcipConfig, DataConfig
from acip_export.ranking.data import window_length
from acip_export.ranking.load import linear_weights
from acip_export.ranking.sharding import by_block
from acip_export.ranking.side_by_side import at_once, layer_bytes

# What is measured (docs/LOG.md): Python, torch, transformers and a tokenizer with its text, in bytes and in seconds.
_LIBRARIES, _START = 470_000_000, 9.0
# Passes through blocks reach this share of the speed of their largest products.
_REACHED = 0.75
# Packing a moment of n columns, in products of n x n matrices in float64.
_PACKING = 4.5
# Arrays as large as the logits that are alive at once: probabilities, their squares, and what gradients take.
_LOGITS = 9
# Operations that passes over one logit, and over one element of a block's activations, take as long as.
_BY_LOGIT, _BY_ELEMENT = 100, 25
# An eigendecomposition of n columns in products of n x n matrices.
_EIGEN = 9.0
_LOGITS_AT_ONCE = 2**24
# Bytes of an entry of a moment: six bits (docs/score-file.md).
_PACKED = 0.75
# Bytes of each row of a moment beside its entries, and of a component beside its factors: a singular value and losses.
_BY_ROW, _BY_COMPONENT = 16, 36
# Of modules that write into the residual stream: what they read nobody else does.
_WRITES = re.compile(r"(^|[._])(o_proj|out_proj|down_proj|c_proj|dense|fc2|out_lin|lin2)$")


@dataclass(frozen=True)
class RankEstimate:
    """Hold what a ranking takes.

    Attributes:
        seconds: by stage. memory: peak bytes of the process. disk: bytes of scratch file and score file together.
    """

    seconds: Mapping[str, float]
    memory: int
    disk: int

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class _Block:
    """Hold the sizes of the linear layers of one block."""

    shapes: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]  # widths of the tensors that they read, each once

    @property
    def weights(self) -> int:
        return sum(out * width for out, width in self.shapes)

    @property
    def factors(self) -> int:
        return sum(min(shape) * sum(shape) for shape in self.shapes)

    @property
    def triangles(self) -> int:
        """Numbers in the triangles of its moments; those of outputs wider than their inputs are kept as narrow."""
        return sum(n * (n + 1) // 2 for n in (*self.inputs, *(min(shape) for shape in self.shapes)))

    @property
    def squares(self) -> tuple[int, int]:
        """Numbers in the moments of inputs, and of gradients."""
        return sum(n * n for n in self.inputs), sum(out * out for out, _ in self.shapes)

    @property
    def width(self) -> int:
        """Numbers that one token brings to the inputs and to the outputs of its layers."""
        return sum(self.inputs) + sum(out for out, _ in self.shapes)


class RankModel:
    """Know the sizes that a ranking's time, memory and disk follow from.

    Args:
        beside: seconds of what follows a ranking, by stage.
    """

    def __init__(self, checkpoint: Checkpoint, beside: Mapping[str, float] = MappingProxyType({})) -> None:
        self.beside = beside
        self.shape = checkpoint.shape
        modules = checkpoint.linear_modules
        self.blocks = [_block({name: modules[name] for name in names}) for _, names in by_block(modules)]
        self.weights = linear_weights(checkpoint)
        self.checkpoint = checkpoint
        first = f"{next(iter(modules))}.weight"
        stored = {"F16": 2, "BF16": 2}.get(checkpoint.tensors[first].dtype, 4)
        self.stored_bytes = stored
        self.weight_bytes = 4 if self.weights <= 100_000_000 else stored

    @property
    def moment_columns(self) -> list[int]:
        """Columns of the second moments of what all linear layers read."""
        return [columns for block in self.blocks for columns in block.inputs]

    def estimate(
        self, calibration: DataConfig, algorithm: Algorithm, acip: AcipConfig | None, machine: Machine
    ) -> RankEstimate:
        """Return what a ranking with these settings takes, in one process, on processors."""
        calibration = calibration.for_weights(self.weights)
        return RankEstimate(
            {**self._seconds(calibration, algorithm, acip, machine), **self.beside},
            self._memory(calibration, acip, machine),
            self._disk(calibration, algorithm),
        )

    def step_seconds(self, acip: AcipConfig, context: int, machine: Machine) -> float:
        """Return what a step of masks or adapters takes: the dense model forward, the masked one there and back."""
        by_token = sum(2 * 3 * (0.85 * b.factors) + 4 * self._attention(context) for b in self.blocks)
        by_token += 3 * self._head() + 2 * _BY_LOGIT * self.shape.vocabulary
        return acip.batch * context * by_token / machine.float32

    def _seconds(
        self, calibration: DataConfig, algorithm: Algorithm, acip: AcipConfig | None, machine: Machine
    ) -> dict[str, float]:
        context = window_length(self.checkpoint, calibration)
        inputs, graded = _tokens(calibration)
        head, attention = self._head(), self._attention(context)
        elements = _BY_ELEMENT * (6 * self.shape.hidden + 4 * self.shape.ffn)
        sweep = packing = factors = fisher = 0.0
        for block in self.blocks:
            once = 2 * block.weights + attention + elements
            of_inputs, of_gradients = block.squares
            sweep += inputs * (once + 1.2 * of_inputs) + graded * (2.5 * once + 1.2 * of_gradients)
            packing += _PACKING * sum(n**3 for n in (*block.inputs, *(min(shape) for shape in block.shapes)))
            factors += sum(_decomposition(*shape) for shape in block.shapes) + sum(n**3 / 3 for n in block.inputs)
            fisher += graded * 2.4 * block.factors
        sweep += graded * (2 * head + _BY_LOGIT * self.shape.vocabulary)
        curve = 0.0
        for ratio in calibration.curve_ratios:
            cut = sum(2 * ratio * b.weights + attention + elements for b in self.blocks)
            curve += calibration.curve_tokens * (cut + head + _BY_LOGIT / 2 * self.shape.vocabulary)
        seconds = {
            "start": _START,
            "statistics": sweep / (_REACHED * machine.float32) + packing / machine.float64,
            "components": factors / machine.float64,
            "curve": curve * (1 if acip is None else 2.8) / (_REACHED * machine.float32),
        }
        if algorithm.fisher:
            seconds["fisher"] = fisher / machine.float32
        if acip is not None:
            steps = mask_steps_of(acip) + acip.post_tune
            seconds["learning"] = steps * self.step_seconds(acip, context, machine)
        return seconds

    def _memory(self, calibration: DataConfig, acip: AcipConfig | None, machine: Machine) -> int:
        shape, context = self.shape, window_length(self.checkpoint, calibration)
        batch = calibration.batch * context
        _, graded = _tokens(calibration)
        embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied_embeddings else 2)
        # Widened where the processor has no products of the stored type, with the pages that they were read from.
        always = _LIBRARIES + embeddings * (4 + self.stored_bytes) + 4 * graded * shape.hidden
        always += self.weights * 4 if self.weight_bytes == 4 else 0
        block = max(self.blocks, key=lambda b: b.weights)
        logits = _LOGITS * 4 * min(_LOGITS_AT_ONCE, batch * shape.vocabulary)
        activations = 4 * batch * (3 * block.width + 6 * shape.hidden) + 4 * sum(block.squares)
        sides = max(block.shapes, key=lambda s: s[0] ** 2 + s[1] ** 2)
        largest = layer_bytes((sides[0], sides[1]))
        linear_algebra = largest * at_once(largest, machine.threads)
        phases = [logits, activations + 2 * block.weights * 4, linear_algebra]
        if acip is not None:
            tokens = acip.batch * context
            kept = sum(b.width + sum(min(s) for s in b.shapes) + 8 * shape.hidden for b in self.blocks)
            always += sum(b.factors for b in self.blocks) * self.weight_bytes
            phases.append(logits + 4 * tokens * kept)
        return int(always + max(phases))

    def _disk(self, calibration: DataConfig, algorithm: Algorithm) -> int:
        inputs, graded = _tokens(calibration)
        hidden = 4 * self.shape.hidden
        # What is replaced stays until the block is done, so that a killed process goes on from there.
        states = hidden * (graded * (len(self.blocks) + 3) + 2 * (inputs - graded))
        samples = sum(2 * graded * b.width for b in self.blocks) if algorithm.fisher else 0
        moments = sum(_PACKED * b.triangles + _BY_ROW * sum((*b.inputs, *map(min, b.shapes))) for b in self.blocks)
        components = sum(min(shape) for b in self.blocks for shape in b.shapes)
        factors = sum(b.factors for b in self.blocks) * self.weight_bytes + _BY_COMPONENT * components
        curve = 2 * hidden * calibration.curve_tokens * len(calibration.curve_ratios)
        # Moments once more in the score file; hidden states are gone when the curve is measured.
        return int(samples + 2 * moments + max(states, factors + curve))

    def _head(self) -> int:
        return 2 * self.shape.vocabulary * self.shape.hidden if self.shape.generates else 0

    def _attention(self, context: int) -> int:
        return 4 * context * self.shape.heads * self.shape.head_dim


def _block(modules: Mapping[str, tuple[int, int]]) -> _Block:
    inputs: dict[tuple[str, int, bool], int] = {}
    for name, (_, width) in modules.items():
        inputs[name.rpartition(".")[0], width, bool(_WRITES.search(name))] = width
    return _Block(tuple(modules.values()), tuple(inputs.values()))


def _tokens(calibration: DataConfig) -> tuple[int, int]:
    assert calibration.statistics_tokens is not None and calibration.gradient_tokens is not None
    return calibration.statistics_tokens, min(calibration.gradient_tokens, calibration.statistics_tokens)


def _decomposition(out: int, inputs: int) -> float:
    """Count operations in float64: one root, whitening, the eigenvectors of the Gram matrix, and predicted losses."""
    small, large = sorted((out, inputs))
    roots = out**3 / 3
    whitening = 2 * out * inputs * (out + inputs)
    eigen = _EIGEN * small**3 + 4 * small * small * large
    undone = small * (out * out + inputs * inputs)
    losses = 2 * small * (out * out + inputs * inputs)
    return roots + whitening + eigen + undone + losses


def open_sizes(model: str | Path) -> Checkpoint:
    """Open a model directory or id; of a directory that has no weights, as ``config.json`` says that they would be.

    Raises:
        CheckpointError: no model directory. UnsupportedError: transformers does not know the model.
    """
    path = Path(model)
    if not (path / "config.json").is_file() or any(path.glob("*.safetensors*")):
        return Checkpoint.open(model)
    config = read_json_object(path / "config.json", CheckpointError)
    shapes, _ = expected_parameters(config)
    dtype = {"float32": "F32", "float16": "F16"}.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    return Checkpoint(path, config, {name: TensorInfo(shape, dtype, "", 0, 0) for name, shape in shapes.items()})
