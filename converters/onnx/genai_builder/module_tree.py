"""A module tree without matrices: what the builder walks in place of a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from acip_export.errors import UnsupportedError

ReadVector = Callable[[str], Tensor]


class Projection(nn.Module):
    """Stands for a linear layer.

    Attributes:
        tensor: name of its matrix. rows: how many outputs it has.
        bias: (out,) float32 or ``None``; the builder makes the Add node from it.
    """

    bias: Tensor | None

    def __init__(self, tensor: str, rows: int, bias: Tensor | None) -> None:
        super().__init__()
        self.tensor, self.rows = tensor, rows
        self.register_buffer("bias", bias)


@dataclass(frozen=True)
class Skeleton:
    """The tree and what it cannot carry itself.

    Attributes:
        model: a ``transformers`` causal language model whose linear layers are :class:`Projection`, whose norms are
            real, and whose embedding is on the meta device.
        vectors: names of its norms and biases.
        layer_types: ``full_attention`` or ``sliding_attention`` of every layer.
        window: tokens that a sliding layer attends to, itself included; ``None``: as many as any other.
        half: the graph computes in float16.
        rotary: by kind of layer, the tables of cosines and sines, float32 (context, rotated / 2) each.
    """

    model: Any
    vectors: tuple[str, ...]
    layer_types: tuple[str, ...]
    window: int | None
    half: bool
    rotary: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]

    def rotary_tables(self, layer: int) -> tuple[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """A suffix that tells the model's kinds of tables apart, and the tables of a layer."""
        kind = self.layer_types[layer]
        if kind not in self.rotary:
            return "", self.rotary[""]
        return f"_{kind.removesuffix('_attention')}", self.rotary[kind]


def make_skeleton(config: Mapping[str, Any], half: bool, context: int, read_vector: ReadVector | None) -> Skeleton:
    """Build the tree of ``config`` without its matrices.

    Args:
        half: whether the graph computes in float16.
        read_vector: gives one-dimensional parameters by name; ``None`` fills them with ones, which changes no shape.

    Raises:
        UnsupportedError: the architecture.
    """
    from acip_export.model.torch_model import causal_lm

    kind = config.get("model_type")
    try:
        with torch.device("meta"):
            model: Any = causal_lm(config)
    except (ValueError, KeyError, TypeError) as reason:
        raise UnsupportedError(f"transformers cannot build a {kind} model of this config.json: {reason}") from reason
    names = tuple(name for name, parameter in model.named_parameters() if parameter.ndim == 1)
    vectors = {
        name: torch.ones(model.get_parameter(name).shape) if read_vector is None else read_vector(name).float()
        for name in names
    }
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            projection = Projection(f"{name}.weight", module.out_features, _bias(name, vectors))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, projection)
    for name, vector in vectors.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Parameter(vector, requires_grad=False))
    layer_types, window = _attention_spans(model.config, context)
    return Skeleton(model, names, layer_types, window, half, _rotary(model, context))


def _attention_spans(config: Any, context: int) -> tuple[tuple[str, ...], int | None]:
    """The kind of every layer and the window of the sliding ones; a window as long as the context is none."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    # Where the configuration names no kinds, a window counts for all layers (Mistral).
    default = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or default
    return tuple(kinds), None if window is None or window >= context else int(window)


def _rotary(model: Any, context: int) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Tables by kind of layer where the model tells kinds apart (Gemma 3), else one pair under an empty name."""
    stock = model.model.rotary_emb
    rotary = type(stock)(model.config)
    positions, like = torch.arange(context)[None], torch.zeros(1)

    def halves(*args: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        cosines, sines = rotary(like, positions, *args)
        half = cosines.shape[-1] // 2
        return cosines[0, :, :half].contiguous().numpy(), sines[0, :, :half].contiguous().numpy()

    if isinstance(getattr(rotary, "rope_type", None), dict):
        return {kind: halves(kind) for kind in sorted(rotary.rope_type)}
    return {"": halves()}


def _bias(module: str, vectors: dict[str, Tensor]) -> Tensor | None:
    """The bias of a linear layer, never entirely zero.

    The builder leaves an all-zero bias out, so the graph would depend on numbers that a prediction does not have. The
    smallest normal float32 changes no sum.
    """
    bias = vectors.pop(f"{module}.bias", None)
    if bias is not None and not bool(bias.any()):
        bias = torch.full_like(bias, torch.finfo(torch.float32).tiny)
    return bias
