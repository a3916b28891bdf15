"""Names of tensors in old checkpoints, made those that transformers' modules have today."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acip_export.model.architectures import architecture_of
from acip_export.model.tensor_names import HEAD, layer_of

# Masks and frequencies that older versions of transformers saved with the weights: computed today. Vectors with the
# masks' names would be biases.
_COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")
_MASKS = re.compile(r"\.(attn|attention|self_attention)\.(masked_)?bias$")


@dataclass(frozen=True)
class Stored:
    """How a tensor lies in a checkpoint: under which name, and whether as (in, out)."""

    name: str
    transposed: bool


def stored_names(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Return the tensors of a causal language model by today's names, without those that are computed.

    Args:
        shapes: of all stored tensors.
    """
    row = architecture_of(config)
    whole = any(name.startswith(row.base_prefix) for name in shapes)
    names = {}
    for name, shape in shapes.items():
        if _COMPUTED.search(name) or (_MASKS.search(name) and len(shape) != 1):
            continue
        prefix = "" if whole or name.startswith(HEAD.removesuffix("weight")) else row.base_prefix
        transposed = row.transposed and len(shape) == 2 and layer_of(name) is not None
        names[prefix + name.replace(*row.renamed)] = Stored(name, transposed)
    return names
