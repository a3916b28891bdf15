"""What the families share: tensor names, hyper-parameters, rotary embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from acip_export.checkpoint import ModelShape
from acip_export.errors import MissingExtraError, UnsupportedError
from converters.gguf.writer import Metadata, float32, string, uint32

Rows = npt.NDArray[np.int64]

_OUTER = ("token_embd.weight", "output_norm.weight")
_LAYER = (
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_norm.weight",
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
)
# Buffers that old checkpoints carry and that every runtime computes for itself.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Family:
    """How llama.cpp expects one family of models.

    Attributes:
        name: llama.cpp's architecture name. classes: Hugging Face classes of the family.
        extra: required tensors of each layer beyond the usual nine. optional: those that may be there.
        interleaved_rope: llama.cpp rotates neighbouring pairs, so that rows of q and k have to be reordered.
        square_query: llama.cpp takes the heads' total width to be the hidden size.
    """

    name: str
    classes: tuple[str, ...]
    extra: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    interleaved_rope: bool = False
    square_query: bool = False

    def tensor_names(self, names: Iterable[str], shape: ModelShape) -> dict[str, str]:
        """``{Hugging Face name: GGUF name}``.

        Raises:
            UnsupportedError: tensors that llama.cpp has no place for, or that it needs and the model lacks.
            MissingExtraError: gguf is not installed.
        """
        try:
            import gguf
        except ImportError:
            raise MissingExtraError("gguf", "gguf", "writing GGUF") from None

        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.name.upper()], shape.layers)
        mapped: dict[str, str] = {}
        unmapped: list[str] = []
        required = self._required(shape)
        allowed = required | self._optional(shape)
        for name in names:
            if name.endswith(_IGNORED_SUFFIXES):
                continue
            found = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if found in allowed and found not in mapped.values():
                mapped[name] = found
            else:
                unmapped.append(name)
        missing = sorted(required - set(mapped.values()))
        if unmapped or missing:
            raise UnsupportedError(
                f"the model's tensors are not those of llama.cpp's {self.name!r}: "
                f"no place for {_some(unmapped)}; nothing for {_some(missing)}"
            )
        return mapped

    def _required(self, shape: ModelShape) -> set[str]:
        head = () if shape.tied_embeddings else ("output.weight",)
        return {*_OUTER, *head, *_per_layer((*_LAYER, *self.extra), shape)}

    def _optional(self, shape: ModelShape) -> set[str]:
        return {"output.weight", *_per_layer(self.optional, shape)}

    def row_order(self, gguf_name: str, shape: ModelShape) -> Rows | None:
        """The order in which the rows of a weight, bias or ``up`` factor are written; ``None``: as they are."""
        heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(gguf_name.split(".")[-2])
        if not self.interleaved_rope or heads is None or not gguf_name.startswith("blk."):
            return None
        rows = np.arange(heads * shape.head_dim, dtype=np.int64)
        # Hugging Face rotates (i, i + d/2); llama.cpp (2i, 2i + 1).
        return rows.reshape(heads, 2, shape.head_dim // 2).swapaxes(1, 2).reshape(-1)

    def hyperparameters(self, config: Mapping[str, Any], shape: ModelShape) -> Metadata:
        """The ``<architecture>.*`` keys.

        Raises:
            UnsupportedError: the config asks for something that llama.cpp does not compute.
        """
        _check_config(config)
        if self.square_query and shape.heads * shape.head_dim != shape.hidden:
            raise UnsupportedError(
                f"llama.cpp's {self.name!r} needs heads as wide as the hidden size {shape.hidden} together; "
                f"config.json has {shape.heads} of {shape.head_dim}"
            )
        rope = _rope(config)
        keys = {
            "context_length": uint32(shape.max_context),
            "embedding_length": uint32(shape.hidden),
            "block_count": uint32(shape.layers),
            "feed_forward_length": uint32(shape.ffn),
            "attention.head_count": uint32(shape.heads),
            "attention.head_count_kv": uint32(shape.kv_heads),
            "attention.key_length": uint32(shape.head_dim),
            "attention.value_length": uint32(shape.head_dim),
            "attention.layer_norm_rms_epsilon": float32(float(config["rms_norm_eps"])),
            "rope.dimension_count": uint32(shape.head_dim),
            "rope.freq_base": float32(float(rope["theta"])),
            "vocab_size": uint32(shape.vocabulary),
        }
        if rope["type"] == "linear":
            keys["rope.scaling.type"] = string("linear")
            keys["rope.scaling.factor"] = float32(float(rope["factor"]))
        return {f"{self.name}.{key}": value for key, value in keys.items()}

    def constants(self, config: Mapping[str, Any], shape: ModelShape) -> dict[str, npt.NDArray[np.float32]]:
        """Tensors that the file has and the checkpoint has not: Llama 3's frequency factors."""
        rope = _rope(config)
        return {"rope_freqs.weight": _llama3_factors(rope, shape)} if rope["type"] == "llama3" else {}


def _per_layer(names: Iterable[str], shape: ModelShape) -> set[str]:
    return {f"blk.{layer}.{name}" for layer in range(shape.layers) for name in names}


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"llama.cpp computes SiLU here, config.json asks for {config['hidden_act']!r}")
    layer_types = set(config.get("layer_types") or ()) - {"full_attention"}
    if config.get("use_sliding_window") or layer_types:
        raise UnsupportedError("config.json asks for sliding-window attention, which the GGUF converter does not write")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """``type``, ``theta`` and the scaling's fields, from either generation of config.json."""
    fields = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedError(
            f"rotary embedding {kind!r} is not supported for GGUF; supported: default, linear, llama3"
        )
    return {**fields, "type": kind, "theta": fields.get("rope_theta") or config.get("rope_theta") or 10000.0}


def _llama3_factors(rope: Mapping[str, Any], shape: ModelShape) -> npt.NDArray[np.float32]:
    """Divisors of the frequencies, (head_dim / 2,): 1 for short wavelengths, ``factor`` for long ones (Llama 3.1)."""
    exponents = np.arange(0, shape.head_dim, 2) / shape.head_dim
    wavelengths = 2 * math.pi * float(rope["theta"]) ** exponents
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
