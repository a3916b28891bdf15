"""Write rotary embeddings: config.json's scalings as llama.cpp's keys and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from acip_export.errors import UnsupportedError
from acip_export.model.rope import rope_fields
from acip_export.model.shape import ModelShape
from converters.gguf.writer import Value, float32, string, uint32

Floats = npt.NDArray[np.float32]

# llama.cpp takes the correction range of YaRN from these, whatever the file says (llama-hparams.h).
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one kind of layers.

    Attributes:
        kind: default, linear, llama3, yarn or longrope.
        theta: base of the wavelengths.
        dimensions: how many dimensions of a head are rotated.
        fields: the scaling's own parameters, under transformers' names.
    """

    kind: str
    theta: float
    dimensions: int
    fields: Mapping[str, Any]

    def number(self, name: str) -> float:
        """Return a parameter of the scaling.

        Raises:
            UnsupportedError: config.json lacks it.
        """
        if self.fields.get(name) is None:
            raise UnsupportedError(f"config.json's rotary embedding {self.kind!r} has no {name!r}")
        return float(self.fields[name])


def read_rope(config: Mapping[str, Any], shape: ModelShape, kinds: tuple[str, ...], layer_type: str) -> Rope:
    """Return the rotary embedding that config.json asks for.

    Args:
        config: the content of config.json.
        shape: the model's shape.
        kinds: the kinds that llama.cpp computes for this architecture.
        layer_type: ``full_attention`` or ``sliding_attention``: which layers, if their parameters differ.

    Raises:
        UnsupportedError: config.json asks for another kind.
    """
    fields = rope_fields(config, layer_type)
    kind = fields["rope_type"]
    if kind not in kinds:
        raise UnsupportedError(
            f"llama.cpp computes no rotary embedding {kind!r} for this architecture; it does: {', '.join(kinds)}"
        )
    rotated = int(shape.head_dim * float(fields["partial_rotary_factor"]))
    return Rope(kind, float(fields["rope_theta"]), rotated, fields)


def rope_keys(rope: Rope, shape: ModelShape) -> dict[str, Value]:
    """Return the keys below ``<architecture>.rope.``.

    Raises:
        UnsupportedError: parameters that llama.cpp has no key for.
    """
    keys = {"dimension_count": uint32(rope.dimensions), "freq_base": float32(rope.theta)}
    if rope.kind == "linear":
        keys |= {"scaling.type": string("linear"), "scaling.factor": float32(rope.number("factor"))}
    elif rope.kind == "yarn":
        keys |= _yarn_keys(rope)
    elif rope.kind == "longrope":
        original = int(rope.number("original_max_position_embeddings"))
        factor = float(rope.fields.get("factor") or shape.max_context / original)
        attention = rope.fields.get("attention_factor")
        if attention is None:  # as transformers does (modeling_rope_utils.py)
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        keys |= {
            "scaling.type": string("longrope"),
            "scaling.original_context_length": uint32(original),
            "scaling.attn_factor": float32(float(attention)),
        }
    return keys


def _yarn_keys(rope: Rope) -> dict[str, Value]:
    for name, expected in _YARN_BETAS.items():
        if float(rope.fields.get(name) or expected) != expected:
            raise UnsupportedError(f"llama.cpp's YaRN has {name} {expected}, config.json has {rope.fields[name]}")
    if rope.fields.get("truncate") is False:
        raise UnsupportedError("llama.cpp's YaRN truncates its correction range, config.json asks it not to")
    factor = rope.number("factor")
    plain = _yarn_attention(factor, 1.0)
    attention = rope.fields.get("attention_factor")
    if attention is None:
        both = rope.fields.get("mscale"), rope.fields.get("mscale_all_dim")
        attention = _yarn_attention(factor, both[0]) / _yarn_attention(factor, both[1]) if all(both) else plain
    keys = {
        "scaling.type": string("yarn"),
        "scaling.factor": float32(factor),
        "scaling.original_context_length": uint32(int(rope.number("original_max_position_embeddings"))),
    }
    if not math.isclose(float(attention), plain):
        keys["scaling.attn_factor"] = float32(float(attention) / plain)  # on top of the one it computes itself
    return keys


def _yarn_attention(factor: float, scale: Any) -> float:
    return 1.0 if factor <= 1 else 0.1 * float(scale) * math.log(factor) + 1.0


def rope_tensors(rope: Rope) -> dict[str, Floats]:
    """Return the tensors of divisors that llama.cpp applies to the frequencies, each (dimensions / 2,).

    Raises:
        UnsupportedError: longrope factors of another length.
    """
    if rope.kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope)}
    if rope.kind != "longrope":
        return {}
    tensors = {}
    for name in ("long", "short"):
        factors = np.asarray(rope.fields.get(f"{name}_factor") or (), np.float32)
        if factors.shape != (rope.dimensions // 2,):
            raise UnsupportedError(
                f"config.json has {factors.size} values in {name}_factor, {rope.dimensions // 2} are needed"
            )
        tensors[f"rope_factors_{name}.weight"] = factors
    return tensors


def _llama3_factors(rope: Rope) -> Floats:
    """Return the divisors of Llama 3.1: 1 for short wavelengths, ``factor`` for long ones, between them in between."""
    exponents = np.arange(0, rope.dimensions, 2) / rope.dimensions
    wavelengths = 2 * math.pi * rope.theta**exponents
    factor, original = rope.number("factor"), rope.number("original_max_position_embeddings")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
