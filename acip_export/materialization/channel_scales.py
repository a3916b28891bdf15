"""Scale a model's channels before it is rounded, so that weights that share a step are of one size.

The columns that read a channel are multiplied by s, and what writes the channel is divided by it: the function stays
the same (the idea of AWQ, arXiv 2306.00978, and SmoothQuant, arXiv 2211.10438). A norm's weights take the division for
q, k and v, and for gate and up; the rows of up take it for down, and those of v for o, where all query heads of a group
read the channels of one key-value head.

With w the root mean square of a channel's columns, their rows weighed by the second moment of the loss gradient at the
output, and e = w^2 E[x^2] what the channel brings to the layer, over its geometric mean over the layer's channels,
s = (1 + e)^(EXPONENT / 2) / w: all columns become of one size, but those of the few channels with outlying inputs,
which are to be rounded more finely, larger. However a checkpoint shares sizes between the tensors that write a channel
and those that read it, they come out the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import FloatArray, ModuleScores, ScoreFile
from acip_export.lowrank.moments import PackedMoment, is_projected
from acip_export.model.architectures import architecture_of
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import block_of
from acip_export.weight_types import weight_type

# Measured on a real model: without it outlying inputs cost twice as much, with twice as much all others a tenth more.
EXPONENT = 0.25
# Of the mean: channels that calibration never excited, or that nothing reads, count as this much.
_FLOOR = 1e-6
# Of a matrix, squared at once.
_ROWS = 1024

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
    "self_attn.v_proj": ("self_attn.o_proj",),
}


@dataclass(frozen=True)
class _Scaling:
    """What happens to a tensor: ``weight * columns / rows``; a vector has rows."""

    columns: FloatArray | None = None
    rows: FloatArray | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """Return the tensor in float32."""
        scaled = weight.float()
        if self.columns is not None:
            scaled = scaled * torch.from_numpy(self.columns)
        if self.rows is not None:
            divisor = torch.from_numpy(self.rows)
            scaled = scaled / (divisor[:, None] if scaled.ndim == 2 else divisor)
        return scaled


class ScaledCheckpoint(Checkpoint):
    """A checkpoint whose channels are scaled as they are read.

    Attributes:
        scaled: names of the tensors that differ from what is stored; they are float32.
    """

    def __init__(self, checkpoint: Checkpoint, scalings: Mapping[str, _Scaling]) -> None:
        super().__init__(checkpoint.path, checkpoint.config, checkpoint.tensors, checkpoint.options, checkpoint.stamps)
        self._scalings = scalings

    @property
    def scaled(self) -> frozenset[str]:
        return frozenset(self._scalings)

    def scaled_sides(self, name: str) -> tuple[bool, bool]:
        """Tell whether the columns and the rows of a tensor are scaled."""
        scaling = self._scalings.get(name, _Scaling())
        return scaling.columns is not None, scaling.rows is not None

    def read(self, name: str) -> Tensor:
        """See :meth:`Checkpoint.read`."""
        weight = super().read(name)
        scaling = self._scalings.get(name)
        return weight if scaling is None else scaling.apply(weight)


def scale_channels(
    checkpoint: Checkpoint, scores: ScoreFile, plan: Plan | None = None
) -> tuple[ScaledCheckpoint, ScoreFile]:
    """Return the model with its channels scaled, and the scores as they would be had it been ranked.

    Args:
        plan: channels are left alone where it rounds none of the matrices that read them, and where a matrix becomes a
            pair, whose components are those of the matrix as it is; ``None``: all are scaled that can be.
    """
    scalings: dict[str, _Scaling] = {}
    for writer, readers in _groups(checkpoint, scores, plan):
        scales = _scales(checkpoint, scores, readers, checkpoint.tensors[writer].shape[0])
        columns = scales.reshape(-1).copy()
        for reader in readers:
            name = f"{reader}.weight"
            scalings[name] = replace(scalings.get(name, _Scaling()), columns=columns)
        scalings[writer] = replace(scalings.get(writer, _Scaling()), rows=scales[:, 0].reshape(-1).copy())
    modules = dict(scores.modules)
    moments: dict[str, tuple[str, FloatArray]] = {}
    for name, scaling in scalings.items():
        module = modules.get(name.removesuffix(".weight"))
        if module is not None:
            modules[name.removesuffix(".weight")] = _scaled_scores(name, module, scaling, moments)
    second_moments = _ScaledMoments(scores.second_moments, moments)
    return ScaledCheckpoint(checkpoint, scalings), replace(scores, modules=modules, second_moments=second_moments)


def _groups(checkpoint: Checkpoint, scores: ScoreFile, plan: Plan | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the tensor that writes channels, and the modules that read them."""
    layer = architecture_of(checkpoint.config).layer
    # Norms come with the base file there, as they are.
    if layer is None or not layer.plain_norms or "base_gguf" in checkpoint.options:
        return
    blocks = dict.fromkeys(block for name in checkpoint.linear_modules if (block := block_of(name)) is not None)
    for block in blocks:
        for writer, inner in _READERS.items():
            readers = tuple(f"{block}.{name}" for name in inner)
            writes = f"{block}.{writer}.weight"
            involved = readers if writer.endswith("layernorm") else (*readers, f"{block}.{writer}")
            if (
                writes in checkpoint.tensors
                and f"{block}.{writer}.bias" not in checkpoint.tensors
                and all(name in scores.modules for name in involved)
                and (plan is None or _pays(plan, involved, readers))
            ):
                yield writes, readers


def _pays(plan: Plan, involved: tuple[str, ...], readers: tuple[str, ...]) -> bool:
    decisions = {decision.module: decision for decision in plan.tensors if decision.module in involved}
    whole = all(decisions[name].representation in ("dense", "residual") for name in involved)
    return whole and any(not weight_type(plan.format, decisions[name].type or "").is_float for name in readers)


def _scales(checkpoint: Checkpoint, scores: ScoreFile, readers: tuple[str, ...], written: int) -> FloatArray:
    """Return the scales of what ``readers`` read, (heads, group, channels of a head), one for all of a group.

    Args:
        written: how many channels there are. Of the inputs of o each stands for several, one for every query head.
    """
    shape, inputs = checkpoint.shape, scores.modules[readers[0]].input_moment
    heads, group = (1, 1) if written == len(inputs) else (shape.kv_heads, len(inputs) // written)
    energy, total = np.zeros(len(inputs)), 0.0
    for name in readers:
        gradients = scores.modules[name].gradient_moment.astype(np.float64)
        energy += _column_energy(checkpoint.read(f"{name}.weight"), gradients)
        total += float(gradients.sum())
    size, moment = (
        values.astype(np.float64).reshape(heads, group, -1).mean(axis=1, keepdims=True)
        for values in (energy / (total or 1.0), inputs)
    )
    size, brought = _floored(size), _floored(_floored(size) * moment)
    brought /= np.exp(np.log(brought).mean())
    logs = EXPONENT / 2 * np.log1p(brought) - np.log(size) / 2
    scales: FloatArray = np.exp(logs - logs.mean()).astype(np.float32)
    return np.broadcast_to(scales, (heads, group, scales.shape[2]))


def _column_energy(weight: Tensor, gradients: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the sum over rows of squares, weighed; some rows at a time."""
    weights = torch.from_numpy(gradients).float()
    parts = zip(weight.split(_ROWS), weights.split(_ROWS), strict=True)  # type: ignore[no-untyped-call]
    energy: npt.NDArray[np.float64] = sum((by_row @ rows.float().square()).double() for rows, by_row in parts).numpy()
    return energy


def _floored(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    mean = float(values.mean())
    return np.maximum(values, _FLOOR * mean) if 0 < mean < np.inf else np.ones_like(values)


def _scaled_scores(
    name: str, module: ModuleScores, scaling: _Scaling, moments: dict[str, tuple[str, FloatArray]]
) -> ModuleScores:
    """Return a layer's scores; ``moments`` learns of its second moments, and the scales that they are made with."""
    if scaling.columns is not None:
        columns = scaling.columns
        key = f"{module.input_key}, scaled" if module.input_key else ""
        if key:
            moments[key] = (module.input_key, np.reciprocal(columns))
        a = None if module.adapter_a is None else module.adapter_a * columns
        module = replace(module, input_moment=module.input_moment / columns**2, input_key=key, adapter_a=a)
    if scaling.rows is not None:
        rows = scaling.rows
        key = module.gradient_key
        if key and not is_projected(module.shape):  # what is kept of those is the same
            key = f"{key}, scaled for {name}"
            moments[key] = (module.gradient_key, rows)
        b = None if module.adapter_b is None else module.adapter_b / rows[:, None]
        module = replace(module, gradient_moment=module.gradient_moment * rows**2, gradient_key=key, adapter_b=b)
    return module


class _ScaledMoments(Mapping[str, PackedMoment]):
    """Second moments, some of them scaled when they are asked for."""

    def __init__(self, moments: Mapping[str, PackedMoment], scaled: Mapping[str, tuple[str, FloatArray]]) -> None:
        self._moments, self._scaled = moments, scaled

    def __getitem__(self, key: str) -> PackedMoment:
        if key not in self._scaled:
            return self._moments[key]
        stored, scales = self._scaled[key]
        return self._moments[stored].scaled(scales)

    def __iter__(self) -> Iterator[str]:
        return iter((*self._moments, *self._scaled))

    def __len__(self) -> int:
        return len(self._moments) + len(self._scaled)
