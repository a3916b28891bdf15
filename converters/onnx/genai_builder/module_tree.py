"""A module tree without matrices: what the builder walks in place of a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UnsupportedError
from acip_export.model.tensor_names import DECODER_EMBEDDING, HEAD
from converters.onnx.matrices import Matrix, matrices_of

ReadVector = Callable[[str], Tensor]


class Projection(nn.Module):
    """Stands for a linear layer: one matrix, or a chain that is applied in order.

    Attributes:
        chain: ``(label, matrix)``; the label is empty for a dense weight, ``down`` and ``up`` for a factor pair.
        bias: (out,) float32 or ``None``; the builder makes the Add node from it.
    """

    bias: Tensor | None

    def __init__(self, chain: tuple[tuple[str, Matrix], ...], bias: Tensor | None) -> None:
        super().__init__()
        self.chain = chain
        self.register_buffer("bias", bias)


@dataclass(frozen=True)
class Skeleton:
    """The tree and what it cannot carry itself.

    Attributes:
        model: a ``transformers`` causal language model whose linear layers are :class:`Projection`, whose norms are
            real, and whose embedding is on the meta device.
        embedding: the embedding matrix. tied: the head uses it too.
        layer_types: ``full_attention`` or ``sliding_attention`` of every layer.
        window: tokens that a sliding layer attends to, itself included; ``None``: as many as any other.
        half: the graph computes in float16.
        rotary: by kind of layer, the tables of cosines and sines, float32 (context, rotated / 2) each.
    """

    model: Any
    embedding: Matrix
    tied: bool
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


def make_skeleton(
    config: Mapping[str, Any], tensors: tuple[TensorDecision, ...], context: int, read_vector: ReadVector | None
) -> Skeleton:
    """Build the tree of ``config`` with the decisions in place of the weights.

    Args:
        read_vector: gives one-dimensional parameters by name; ``None`` fills them with ones, which changes no shape.

    Raises:
        UnsupportedError: the architecture, or a decision that ONNX cannot express.
    """
    from acip_export.model.torch_model import causal_lm

    kind = config.get("model_type")
    decisions = {decision.name: decision for decision in tensors}
    try:
        with torch.device("meta"):
            model: Any = causal_lm(dict(config))
    except (ValueError, KeyError, TypeError) as reason:
        raise UnsupportedError(f"transformers cannot build a {kind} model of this config.json: {reason}") from reason
    tied = bool(model.config.tie_word_embeddings)
    if tied:
        decisions.pop(HEAD, None)
    _check_names(set(decisions), {name for name, _ in model.named_parameters()}, type(model).__name__)
    embedding = _embedding(decisions[DECODER_EMBEDDING])
    if tied:
        decisions[HEAD] = decisions[DECODER_EMBEDDING]
    half = embedding.type.item_bytes == 2
    form = "f16" if half else "f32"
    vectors = {name: _vector(d, form, read_vector) for name, d in decisions.items() if len(d.shape) == 1}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            projection = Projection(matrices_of(decisions[f"{name}.weight"]), _bias(name, vectors))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, projection)
    for name, vector in vectors.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Parameter(vector, requires_grad=False))
    layer_types, window = _attention_spans(model.config, context)
    return Skeleton(model, embedding, tied, layer_types, window, half, _rotary(model, context))


def _check_names(decided: set[str], expected: set[str], architecture: str) -> None:
    for name in sorted(expected - decided):
        raise UnsupportedError(f"the plan decides nothing for {name} of a {architecture}; plan again for this model")
    for name in sorted(decided - expected):
        raise UnsupportedError(f"ONNX has no place for {name} in a {architecture}; the config says otherwise")


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


def _embedding(decision: TensorDecision) -> Matrix:
    chain = matrices_of(decision)
    matrix = chain[0][1]
    if len(chain) != 1 or not (matrix.type.is_float or matrix.bits in (4, 8)):
        raise UnsupportedError(f"{decision.name}: ONNX embeddings are dense, of 4 or 8 bits or float; plan again")
    return matrix


def _vector(decision: TensorDecision, form: str, read_vector: ReadVector | None) -> Tensor:
    if decision.type != form:
        raise UnsupportedError(
            f"{decision.name}: norms and biases of this graph are {form}, not {decision.type}; plan again"
        )
    return torch.ones(decision.shape) if read_vector is None else read_vector(decision.name).float()


def _bias(module: str, vectors: dict[str, Tensor]) -> Tensor | None:
    """The bias of a linear layer, never entirely zero.

    The builder leaves an all-zero bias out, so the graph would depend on numbers that a prediction does not have. The
    smallest normal float32 changes no sum.
    """
    bias = vectors.pop(f"{module}.bias", None)
    if bias is not None and not bool(bias.any()):
        bias = torch.full_like(bias, torch.finfo(torch.float32).tiny)
    return bias
