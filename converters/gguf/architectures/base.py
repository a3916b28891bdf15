"""What the families share: tensor names, hyper-parameters, changes of the numbers on their way into the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from acip_export.errors import MissingExtraError, UnsupportedError
from acip_export.formats.protocol import longest_context
from acip_export.model.architectures import ARCHITECTURES
from acip_export.model.shape import ModelShape
from converters.gguf.architectures.rope import Floats, Rope, read_rope, rope_keys, rope_tensors
from converters.gguf.writer import Metadata, Value, booleans, float32, uint32

if TYPE_CHECKING:
    import torch
    from gguf import TensorNameMap

    from acip_export.model.encoder import Encoder

Rows = npt.NDArray[np.int64]

TOKEN_EMBEDDING = "token_embd.weight"
_OUTER = (TOKEN_EMBEDDING, "output_norm.weight")
PRE_NORMS = ("attn_norm.weight", "ffn_norm.weight")
POST_NORMS = ("post_attention_norm.weight", "post_ffw_norm.weight")
ATTENTION = ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")
HEAD_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
FFN = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
ATTENTION_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
FFN_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
# Buffers that old checkpoints carry and that every runtime computes for itself.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Change:
    """What happens to a tensor's numbers: ``weight * scale + shift * scale``, rounded, then rows reordered.

    Attributes:
        rows: order in which the rows are written; ``None``: as they are.
        shift: added to every number; norms only, factor pairs cannot carry it.
    """

    rows: Rows | None = None
    scale: float = 1.0
    shift: float = 0.0

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        import torch

        weight = self.of_numbers(weight)
        return weight if self.rows is None else weight[torch.from_numpy(self.rows)]

    def of_numbers(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the numbers changed, the rows not yet reordered."""
        return (weight.float() + self.shift) * self.scale if self.scale != 1.0 or self.shift else weight


@dataclass(frozen=True)
class Family:
    """How llama.cpp expects one family of models.

    Attributes:
        name: llama.cpp's architecture name. model_types: those of transformers that it runs.
        factor_pairs: the tests run them with the extension; other graphs may multiply by a weight behind its back.
        applies_windows: llama.cpp knows the sliding windows of these models; others attend to everything.
        layer: tensors that every layer has. optional: those that may be there.
        activations: of the FFN, under transformers' names; the first is the default.
        rope_kinds: rotary embeddings that llama.cpp computes here.
        interleaved_rope: llama.cpp rotates neighbouring pairs, so that rows of q and k have to be reordered.
        partial_rope: llama.cpp can leave dimensions of a head unrotated.
        square_query: llama.cpp takes the heads' total width to be the hidden size.
        always_head: llama.cpp needs a head of its own even where the model ties it to the embedding.
        shifted_norms: the model multiplies by one plus the stored weight of a norm.
    """

    name: str
    model_types: tuple[str, ...]
    factor_pairs: bool = False
    applies_windows: bool = False
    layer: tuple[str, ...] = (*PRE_NORMS, *ATTENTION, *FFN)
    optional: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu",)
    rope_kinds: tuple[str, ...] = ("default", "linear", "yarn")
    interleaved_rope: bool = False
    partial_rope: bool = False
    square_query: bool = False
    always_head: bool = False
    shifted_norms: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Hugging Face classes of the family."""
        return tuple(name for kind in self.model_types for name in ARCHITECTURES[kind].classes)

    def tensor_names(self, names: Iterable[str], shape: ModelShape) -> dict[str, str]:
        """``{Hugging Face name: GGUF name}``.

        Raises:
            UnsupportedError: tensors that llama.cpp has no place for, or that it needs and the model lacks.
            MissingExtraError: gguf is not installed.
        """
        table = _name_table(self.name, shape.layers)
        mapped: dict[str, str] = {}
        unmapped: list[str] = []
        required = self._required(shape)
        allowed = required | self._optional(shape)
        taken: set[str] = set()
        for name in names:
            if name.endswith(_IGNORED_SUFFIXES):
                continue
            found = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if found in allowed and found not in taken:
                mapped[name] = found
                taken.add(found)
            else:
                unmapped.append(name)
        missing = sorted(required - taken)
        if missing == ["output.weight"] and shape.tied_embeddings and not unmapped:
            raise UnsupportedError(
                f"llama.cpp's {self.name!r} needs a head of its own, and config.json ties it to the embedding "
                "(tie_word_embeddings): use  --format onnx,  or store the embedding as lm_head.weight too and untie it"
            )
        if unmapped or missing:
            raise UnsupportedError(
                f"the model's tensors are not those of llama.cpp's {self.name!r}: "
                f"no place for {some(unmapped)}; nothing for {some(missing)}"
            )
        return mapped

    def _required(self, shape: ModelShape) -> set[str]:
        head = ("output.weight",) if self.always_head or not shape.tied_embeddings else ()
        return {*_OUTER, *head, *_per_layer(self.layer, shape)}

    def _optional(self, shape: ModelShape) -> set[str]:
        return {"output.weight", *_per_layer(self.optional, shape)}

    def change(self, name: str, config: Mapping[str, Any], shape: ModelShape) -> Change:
        """What happens to the numbers of the tensor ``name`` (GGUF), or of its ``up`` factor."""
        del config  # for families that scale
        return Change(self._rows(name, shape), shift=1.0 if self.shifted_norms and _is_norm(name) else 0.0)

    def _rows(self, name: str, shape: ModelShape) -> Rows | None:
        heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(name.split(".")[-2])
        if not self.interleaved_rope or heads is None or not name.startswith("blk."):
            return None
        return interleaved_rows(heads, shape.head_dim)

    def hyperparameters(self, config: Mapping[str, Any], shape: ModelShape) -> Metadata:
        """The ``<architecture>.*`` keys.

        Raises:
            UnsupportedError: the config asks for something that llama.cpp does not compute.
        """
        self.check(config, shape)
        rope = rope_keys(self.rope(config, shape), shape)
        keys = {
            "context_length": uint32(longest_context(shape, self.applies_windows)),
            "embedding_length": uint32(shape.hidden),
            "block_count": uint32(shape.layers),
            "feed_forward_length": uint32(shape.ffn),
            "attention.head_count": uint32(shape.heads),
            "attention.head_count_kv": uint32(shape.kv_heads),
            "attention.key_length": uint32(shape.head_dim),
            "attention.value_length": uint32(shape.head_dim),
            "attention.layer_norm_rms_epsilon": float32(float(config["rms_norm_eps"])),
            **{f"rope.{key}": value for key, value in rope.items()},
            "vocab_size": uint32(shape.vocabulary),
            **self.own_keys(config, shape),
        }
        return {f"{self.name}.{key}": value for key, value in keys.items()}

    def own_keys(self, config: Mapping[str, Any], shape: ModelShape) -> dict[str, Value]:
        """Keys that only this family has, without the architecture's name."""
        del config, shape
        return {}

    def encoder_keys(self, encoder: Encoder, config: Mapping[str, Any]) -> Metadata:
        """Keys that only encoders have, and how their tokens become one vector."""
        del config
        raise AssertionError(f"{self.name} is no encoder, and {encoder.kind} is asked for")

    def check(self, config: Mapping[str, Any], shape: ModelShape) -> None:
        """Raises UnsupportedError for what llama.cpp would compute differently."""
        if config.get("rms_norm_eps") is None:
            raise UnsupportedError("config.json has no rms_norm_eps")
        activation = config.get("hidden_activation") or config.get("hidden_act") or self.activations[0]
        if activation not in self.activations:
            raise UnsupportedError(
                f"llama.cpp's {self.name!r} computes {self.activations[0]}, config.json asks for {activation!r}"
            )
        if self.square_query and shape.heads * shape.head_dim != shape.hidden:
            raise UnsupportedError(
                f"llama.cpp's {self.name!r} needs heads as wide as the hidden size {shape.hidden} together; "
                f"config.json has {shape.heads} of {shape.head_dim}"
            )
        dimensions = self.rope(config, shape).dimensions
        if dimensions != shape.head_dim and not self.partial_rope:
            raise UnsupportedError(
                f"llama.cpp's {self.name!r} rotates all {shape.head_dim} dimensions of a head; "
                f"config.json asks for {dimensions}"
            )

    def rope(self, config: Mapping[str, Any], shape: ModelShape) -> Rope:
        """The rotary embedding of the layers that attend to everything."""
        return read_rope(config, shape, self.rope_kinds, "full_attention")

    def constants(self, config: Mapping[str, Any], shape: ModelShape) -> dict[str, Floats]:
        """Tensors that the file has and the checkpoint has not: factors of the rotary frequencies."""
        return rope_tensors(self.rope(config, shape))


def interleaved_rows(heads: int, head_dim: int) -> Rows:
    """Hugging Face rotates (i, i + d/2) of a head; llama.cpp (2i, 2i + 1)."""
    rows = np.arange(heads * head_dim, dtype=np.int64)
    return rows.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def window_keys(shape: ModelShape, period: int) -> dict[str, Value]:
    """Window and windowed layers; the latter only where they differ from llama.cpp's: all but every ``period``-th."""
    if shape.sliding_window is None:
        return {}
    keys = {"attention.sliding_window": uint32(shape.sliding_window)}
    if shape.sliding_layers != tuple((layer + 1) % period != 0 for layer in range(shape.layers)):
        keys["attention.sliding_window_pattern"] = booleans(shape.sliding_layers)
    return keys


@lru_cache(maxsize=4)
def _name_table(architecture: str, layers: int) -> TensorNameMap:
    """Return gguf's table of names; a plan asks for it many times, and it takes 30 ms to make."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "writing GGUF") from None
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], layers)


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def _per_layer(names: Iterable[str], shape: ModelShape) -> set[str]:
    return {f"blk.{layer}.{name}" for layer in range(shape.layers) for name in names}


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
