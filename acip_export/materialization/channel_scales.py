"""Scale a model's channels before it is rounded, so that those with large inputs are rounded more finely.

The columns that read a channel are multiplied by s, and what writes the channel is divided by it: the function stays
the same (the idea of AWQ, arXiv 2306.00978, and SmoothQuant, arXiv 2211.10438). s is a power of the channel's second
moment, and its geometric mean over a layer's channels is 1. A norm's weights take the division for q, k and v, and for
gate and up; the rows of up take it for down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import FloatArray, ModuleScores, ScoreFile
from acip_export.lowrank.moments import PackedMoment, is_projected
from acip_export.model.architectures import architecture_of
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import block_of
from acip_export.weight_types import weight_type

# Of a channel's root mean square. Measured on two real models: twice as much gains nothing more.
EXPONENT = 0.25
# A channel that calibration never excited counts as one with this share of the mean.
_FLOOR = 1e-6

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
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
        super().__init__(checkpoint.path, checkpoint.config, checkpoint.tensors, checkpoint.options)
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
        scales = _scales(scores.modules[readers[0]].input_moment)
        for reader in readers:
            name = f"{reader}.weight"
            scalings[name] = replace(scalings.get(name, _Scaling()), columns=scales)
        scalings[writer] = replace(scalings.get(writer, _Scaling()), rows=scales)
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
            involved = (*readers, f"{block}.{writer}") if writer == "mlp.up_proj" else readers
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


def _scales(moment: FloatArray) -> FloatArray:
    wide = moment.astype(np.float64)
    mean = float(wide.mean())
    if not mean > 0:
        return np.ones_like(moment)
    logs = EXPONENT / 2 * np.log(np.maximum(wide, _FLOOR * mean))
    scales: FloatArray = np.exp(logs - logs.mean()).astype(np.float32)
    return scales


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
