"""Reads the names of tensors and modules: which layer they are in, which of them are embeddings and heads.

Names are paths of parts between dots, in ONNX graphs between slashes. Layers are numbered parts, whatever stands before
the number: ``model.layers.3.``, ``transformer.h.3.``, ``bert.encoder.layer.3.``, ``blk.3.``.
"""

from __future__ import annotations

import re

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tokens_embed.weight",
)
"""How names of input embeddings end."""

DECODER_EMBEDDING = "model.embed_tokens.weight"
"""The input embedding of Llama and of the architectures named after it."""

HEAD = "lm_head.weight"
"""The head over the vocabulary of models that generate, whatever else they call by other names."""

MASKED_HEAD = "cls.predictions.decoder.weight"
"""The head over the vocabulary of BERT."""

# Up to the first number that is a part of its own, and not the last one.
_BLOCK = re.compile(r"(?:.*?[./])??(\d+)[./]")
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


def layer_of(name: str) -> int | None:
    """Return the number of the layer that ``name`` is in, or ``None`` outside the layers."""
    block = _BLOCK.match(name)
    return int(block[1]) if block else None


def block_of(name: str) -> str | None:
    """Return the name of the layer that ``name`` is in: ``model.layers.3`` of ``model.layers.3.mlp.up_proj``."""
    block = _BLOCK.match(name)
    return block[0][:-1] if block else None


def within_layer(name: str) -> str:
    """Return what ``name`` is called within its layer: ``mlp.up_proj``. Outside the layers that is the whole name."""
    block = _BLOCK.match(name)
    return name[block.end() :] if block else name


def without_numbers(name: str) -> str:
    """Return what ``name`` has in common with its like in other layers and experts: ``blk.*.attn_q.weight``."""
    return _NUMBER.sub("*", name)


def class_of(name: str) -> str:
    """Return what a tensor or module is in every layer: ``mlp.up_proj``; outside the layers that is the whole name."""
    return without_numbers(within_layer(name.removesuffix(".weight")))


def is_embedding(name: str) -> bool:
    """Tell whether ``name`` is an input embedding, whose rows are looked up."""
    return name.endswith(EMBEDDINGS)


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key that puts layer 10 after layer 9."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))
