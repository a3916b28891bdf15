"""A module tree without matrices: what the builder walks in place of a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acip_export.errors import UnsupportedError
from acip_export.plans import TensorDecision
from converters.onnx.matrices import Matrix, matrices_of

# model_type -> rope types that the builder computes for it; its Llama class ignores what it does not know.
_ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "llama": ("default", "llama3"),
    "mistral": ("default", "linear"),
    "qwen2": ("default", "linear"),
    "qwen3": ("default", "linear"),
}

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

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
    """

    model: Any
    embedding: Matrix
    tied: bool


def make_skeleton(
    config: Mapping[str, Any], tensors: tuple[TensorDecision, ...], context: int, read_vector: ReadVector | None
) -> Skeleton:
    """Build the tree of ``config`` with the decisions in place of the weights.

    Args:
        read_vector: gives one-dimensional parameters by name; ``None`` fills them with ones, which changes no shape.

    Raises:
        UnsupportedError: the architecture, a position encoding, a sliding window shorter than the context, or a
            decision that ONNX cannot express.
    """
    from acip_export.modules import causal_lm

    _check_config(config, context)
    decisions = {decision.name: decision for decision in tensors}
    # No window is shorter than the context (checked), so every layer attends to everything.
    plain = {**{k: v for k, v in config.items() if k != "layer_types"}, "sliding_window": None}
    with torch.device("meta"):
        model = causal_lm(plain)
    tied = bool(config.get("tie_word_embeddings", False))
    if tied:
        decisions.pop(_HEAD, None)
    _check_names(set(decisions), {name for name, _ in model.named_parameters()}, type(model).__name__)
    embedding = _embedding(decisions[_EMBEDDING])
    if tied:
        decisions[_HEAD] = decisions[_EMBEDDING]
    vectors = {name: _vector(d, read_vector) for name, d in decisions.items() if len(d.shape) == 1}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            projection = Projection(matrices_of(decisions[f"{name}.weight"]), _bias(name, vectors))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, projection)
    for name, vector in vectors.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Parameter(vector, requires_grad=False))
    return Skeleton(model, embedding, tied)


def _check_names(decided: set[str], expected: set[str], architecture: str) -> None:
    for name in sorted(expected - decided):
        raise UnsupportedError(f"the plan decides nothing for {name} of a {architecture}; plan again for this model")
    for name in sorted(decided - expected):
        raise UnsupportedError(f"ONNX has no place for {name} in a {architecture}; the config says otherwise")


def _check_config(config: Mapping[str, Any], context: int) -> None:
    kind = config.get("model_type")
    if kind not in _ROPE_TYPES:
        raise UnsupportedError(f"no ONNX export for model type {kind!r}; supported: {', '.join(sorted(_ROPE_TYPES))}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in _ROPE_TYPES[kind]:
        raise UnsupportedError(
            f"no ONNX export for {kind} with rope type {rope_type!r}; supported: {', '.join(_ROPE_TYPES[kind])}"
        )
    window = _sliding_window(config)
    if window is not None and window < context:
        raise UnsupportedError(
            f"this model attends to a sliding window of {window} tokens, and ONNX exports attend to all {context}; "
            f"plan with  --context {window}  or less"
        )


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """Tokens that a layer may look back; the defaults are those of the ``transformers`` configurations."""
    if config["model_type"] == "mistral":
        window = config.get("sliding_window", 4096)
    else:
        window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    return None if window is None else int(window)


def _embedding(decision: TensorDecision) -> Matrix:
    chain = matrices_of(decision)
    matrix = chain[0][1]
    if len(chain) != 1 or not (matrix.format.is_float or matrix.bits in (4, 8)):
        raise UnsupportedError(f"{decision.name}: ONNX embeddings are dense, of 4 or 8 bits or float; plan again")
    return matrix


def _vector(decision: TensorDecision, read_vector: ReadVector | None) -> Tensor:
    if decision.format != "f32":
        raise UnsupportedError(f"{decision.name}: ONNX norms and biases are f32, not {decision.format}; plan again")
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
