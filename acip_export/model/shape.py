"""The sizes of a model, read from its ``config.json``, whatever the architecture calls them there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acip_export.errors import UnsupportedError
from acip_export.model.architectures import architecture_of
from acip_export.model.encoder import is_encoder, kind_of, task_of
from acip_export.model.task import Task

# Our key: the others' keys. Where none is there or its value is null, the key has no entry.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "num_heads", "n_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"),
    "max_position_embeddings": ("n_positions", "seq_length"),
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory and file formulas need, under the config's names made uniform.

    Attributes:
        architecture: the Hugging Face class.
        sliding_window: tokens that windowed layers attend to, the current one included; ``None``: no such layer.
        sliding_layers: for every layer whether it is windowed; empty without a window.
        tied_embeddings: the head reads the embedding. task: what the model is for.
        fused_attention: an ONNX graph attends in place on one cache, and keeps no scores.
    """

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_context: int
    tied_embeddings: bool
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    task: Task = "causal"
    fused_attention: bool = True

    @property
    def generates(self) -> bool:
        """Whether it writes token by token, with a KV cache; encoders do not."""
        return self.task == "causal"


def model_shape(config: Mapping[str, Any], path: Path = Path()) -> ModelShape:
    """Return the sizes that a ``config.json`` names, with transformers' defaults for those that it leaves out.

    Args:
        path: the model directory, for messages.

    Raises:
        UnsupportedError: a mixture of experts, or a configuration without the sizes of a transformer.
    """
    _refuse_experts(config, path)
    every = with_common_keys(config.get("text_config") or config)
    text = {key: value for key, value in every.items() if value is not None}  # null stands for nothing
    try:
        heads = int(text["num_attention_heads"])
        hidden = int(text["hidden_size"])
        layers = int(text["num_hidden_layers"])
        window, windowed = _sliding_window(text, layers)
        return ModelShape(
            architecture=(config.get("architectures") or [text.get("model_type", "unknown")])[0],
            layers=layers,
            hidden=hidden,
            ffn=int(text["intermediate_size"]),
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or hidden // heads),
            vocabulary=int(text["vocab_size"]),
            max_context=int(text.get("max_position_embeddings") or 2048),
            sliding_window=window,
            sliding_layers=windowed,
            tied_embeddings=ties_head(config),
            task=task_of(config),
            fused_attention=architecture_of(text).fused_attention,
        )
    except KeyError as missing:
        raise UnsupportedError(
            f"{path / 'config.json'} has no {missing}; only transformer configurations that name their "
            "layers, heads, hidden and intermediate sizes are supported"
        ) from None


def with_common_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the common keys beside the architecture's own, and the values that it leaves out."""
    row = architecture_of(config)
    full = {"tie_word_embeddings": row.tied, **row.defaults, **config}
    for key, others in _KEYS.items():
        value = next((full[name] for name in (key, *others) if full.get(name) is not None), None)
        if value is not None:
            full[key] = value
    if row.wide_ffn and full.get("intermediate_size") is None and "hidden_size" in full:
        full["intermediate_size"] = 4 * int(full["hidden_size"])
    if row.multi_query and not config.get("new_decoder_architecture", False):
        # Without it the number of heads that is written means nothing.
        shared = bool(config.get("multi_query", True))
        full["num_key_value_heads"] = 1 if shared else full.get("num_attention_heads")
    return full


def ties_head(config: Mapping[str, Any]) -> bool:
    """Tell whether the head reads the embedding."""
    if is_encoder(config):
        # Tied unless they say otherwise, and only one with a head over tokens has what to tie.
        return kind_of(config) == "masked-lm" and bool(config.get("tie_word_embeddings", True))
    return bool(with_common_keys(config.get("text_config") or config)["tie_word_embeddings"])


def _sliding_window(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    window = config.get("sliding_window")
    windowed = architecture_of(config).window(config, layers) if window else ()
    return (int(window), windowed) if window and any(windowed) else (None, ())


def _refuse_experts(config: Mapping[str, Any], path: Path) -> None:
    """Raises UnsupportedError for a mixture of experts, whose matrices are no linear layers and not all used."""
    text = config.get("text_config") or config
    key = next((key for key in _EXPERTS if isinstance(text.get(key), int) and text[key] > 1), None)
    if key is not None:
        raise UnsupportedError(
            f"{path} is a mixture of {text[key]} experts ({key} in its config.json); neither ranking nor any export "
            "knows those. Dense models are supported"
        )
