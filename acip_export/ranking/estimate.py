"""Compute time, memory and disk of a ranking from the sizes of a model, before any weight is read.

Time is counted in floating point operations and divided by what this machine was measured to do in a second.
"""

from __future__ import annotations

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
from acip_export.ranking.block_sizes import BlockSizes
from acip_export.ranking.config import AcipConfig, DataConfig, Precision
from acip_export.ranking.data import window_length
from acip_export.ranking.load import FLOAT32_WEIGHTS, linear_weights
from acip_export.ranking.peak_memory import Held, Passes, learning_bytes, peak_by_phase
from acip_export.ranking.sharding import by_block

# Seconds, measured (docs/LOG.md): Python, torch, transformers and a tokenizer with its text.
_START = 9.0
# Passes through blocks reach this share of the speed of their largest products.
_REACHED = 0.75
# Packing a moment of n columns, in products of n x n matrices in float64.
_PACKING = 4.5
# Operations that passes over one logit, and over one element of a block's activations, take as long as.
_BY_LOGIT, _BY_ELEMENT = 100, 25
# An eigendecomposition of n columns in products of n x n matrices.
_EIGEN = 9.0
_BYTES = {"F16": 2, "BF16": 2}
# Bytes of an entry of a moment: six bits (docs/score-file.md).
_PACKED = 0.75
# Bytes of each row of a moment beside its entries, and of a component beside its factors: a singular value and losses.
_BY_ROW, _BY_COMPONENT = 16, 36


@dataclass(frozen=True)
class RankEstimate:
    """Hold what a ranking takes.

    Attributes:
        seconds: by stage. memory_by_phase: peak bytes of the process. disk: bytes of scratch file and score file
            together.
    """

    seconds: Mapping[str, float]
    memory_by_phase: Mapping[str, int]
    disk: int

    @property
    def memory(self) -> int:
        return max(self.memory_by_phase.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


class RankModel:
    """Know the sizes that a ranking's time, memory and disk follow from.

    Args:
        beside: seconds of what follows a ranking, by stage.
        precision: see :func:`acip_export.ranking.load.load_model`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        beside: Mapping[str, float] = MappingProxyType({}),
        precision: Precision = "auto",
    ) -> None:
        self.beside = beside
        self.shape = checkpoint.shape
        modules = checkpoint.linear_modules
        self.blocks = [BlockSizes.of({name: modules[name] for name in names}) for _, names in by_block(modules)]
        self.weights = linear_weights(checkpoint)
        self.checkpoint = checkpoint
        first = f"{next(iter(modules))}.weight"
        self.stored_dtype = checkpoint.tensors[first].dtype
        wide = precision == "float32" or (precision == "auto" and self.weights <= FLOAT32_WEIGHTS)
        self.weight_bytes = 4 if wide else _BYTES.get(self.stored_dtype, 4)

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
            # The head of the dense model once more for each cut: logits are not kept.
            curve += calibration.curve_tokens * (cut + 2 * (head + _BY_LOGIT / 2 * self.shape.vocabulary))
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

    def _memory(self, calibration: DataConfig, acip: AcipConfig | None, machine: Machine) -> Mapping[str, int]:
        context = window_length(self.checkpoint, calibration)
        _, graded = _tokens(calibration)
        batch, held = calibration.batch * context, self._held(machine)
        phases = peak_by_phase(
            self.shape, self.blocks, held, Passes(batch, graded, calibration.curve_tokens), machine.threads
        )
        if acip is not None:
            phases["learning"] = learning_bytes(self.blocks, self.shape, held, acip.batch * context, batch)
        return phases

    def _held(self, machine: Machine) -> Held:
        """Tell how weights are there: mapped if they are used as they are stored, unless the model is an encoder."""
        stored = _BYTES.get(self.stored_dtype, 4)
        if self.weight_bytes == 4:
            widened = 0 if stored == 4 and self.shape.generates else 4
            return Held(widened, widened, 4, 4)
        narrow = machine.bfloat16 and self.shape.generates and self.stored_dtype == "BF16"
        others, computed = (0, 2) if narrow else (4, 4)
        return Held(0 if self.shape.generates else stored, others, self.weight_bytes, computed)

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
