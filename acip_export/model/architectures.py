"""Where architectures call the same thing by other names: keys of ``config.json``, tensors of old checkpoints.

Everything above the checkpoint sees one convention: the keys below, the names that transformers' modules have today,
and linear weights of shape (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acip_export.errors import UnsupportedError
from acip_export.model.tensor_names import layer_of

# Our key: the others' keys. Where none is there or its value is null, the key has no entry.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "num_heads", "n_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"),
    "max_position_embeddings": ("n_positions", "seq_length"),
}
# Models whose feed-forward layer is four times as wide unless something else is written.
_FOUR_TIMES = frozenset({"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt"})
# Models with a causal head that is the embedding unless config.json denies it; a test compares this with transformers.
TIED_BY_DEFAULT = frozenset(
    """
    bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert cohere
    cohere2 cohere2_moe cohere_compass_text cpmant ctrl data2vec-text electra ernie ernie4_5 ernie4_5_moe falcon
    falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified
    gemma4_unified_assistant gemma4_unified_text got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese
    granite_swa jetmoe lfm2 lfm2_moe lfm3 mamba marian mbart megatron-bert minicpm3 modernbert-decoder
    moss_transcribe_diarize mpt mvp openai-gpt opt pegasus plbart prophetnet recurrent_gemma roberta
    roberta-prelayernorm roc_bert roformer smollm3 starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta
    xlm-roberta-xl xlnet xmod youtu zamba zamba2 zaya
    """.split()  # noqa: SIM905
)
# Models whose attention transformers computes by an exchangeable function, which a traced graph makes one node of.
_FUSED_ATTENTION = frozenset(
    {"gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
    | {"cohere", "gpt2", "gpt_neox", "opt", "stablelm"}
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Checkpoints that were saved from the model without its head lack the first part of each name.
_BASE = {"bloom": "transformer.", "gpt2": "transformer.", "openai-gpt": "transformer.", "opt": "model."}
# Names of parts that transformers' modules gave up.
_RENAMED = {"gpt_neox": ("embed_out.", "lm_head.")}
# Their linear layers are transformers' Conv1D, which stores (in, out).
_TRANSPOSED = frozenset({"gpt2", "openai-gpt"})
# Masks and frequencies that older versions of transformers saved with the weights: computed today. Vectors with the
# masks' names would be biases.
_COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")
_MASKS = re.compile(r"\.(attn|attention|self_attention)\.(masked_)?bias$")


@dataclass(frozen=True)
class Stored:
    """How a tensor lies in a checkpoint: under which name, and whether as (in, out)."""

    name: str
    transposed: bool


def with_common_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the common keys beside the architecture's own."""
    found = dict(config)
    for key, others in _KEYS.items():
        value = next((config[name] for name in (key, *others) if config.get(name) is not None), None)
        if value is not None:
            found[key] = value
    kind = config.get("model_type")
    if kind in _FOUR_TIMES and found.get("intermediate_size") is None and "hidden_size" in found:
        found["intermediate_size"] = 4 * int(found["hidden_size"])
    if kind in TIED_BY_DEFAULT:
        found.setdefault("tie_word_embeddings", True)
    one_head = kind == "gpt_bigcode" or (kind == "falcon" and not config.get("new_decoder_architecture", False))
    if one_head:
        # Without it the number of heads that is written means nothing.
        shared = bool(config.get("multi_query", True))
        found["num_key_value_heads"] = 1 if shared else found.get("num_attention_heads")
    return found


def refuse_experts(config: Mapping[str, Any], path: object) -> None:
    """Raises UnsupportedError for a mixture of experts, whose matrices are no linear layers and not all used."""
    text = config.get("text_config") or config
    key = next((key for key in _EXPERTS if isinstance(text.get(key), int) and text[key] > 1), None)
    if key is not None:
        raise UnsupportedError(
            f"{path} is a mixture of {text[key]} experts ({key} in its config.json); neither ranking nor any export "
            "knows those. Dense models are supported"
        )


def fuses_attention(config: Mapping[str, Any]) -> bool:
    """Whether an ONNX graph of this model attends in place on one cache; of unknown models the worse is assumed."""
    return config.get("model_type") in _FUSED_ATTENTION


def stored_names(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """The tensors of a causal language model by the names of transformers' modules, without those that are computed.

    Args:
        shapes: of all stored tensors.
    """
    kind = str(config.get("model_type"))
    base = _BASE.get(kind, "")
    renamed = _RENAMED.get(kind, ("", ""))
    whole = any(name.startswith(base) for name in shapes)
    found = {}
    for name, shape in shapes.items():
        if _COMPUTED.search(name) or (_MASKS.search(name) and len(shape) != 1):
            continue
        prefix = "" if whole or name.startswith("lm_head.") else base
        transposed = kind in _TRANSPOSED and len(shape) == 2 and layer_of(name) is not None
        found[prefix + name.replace(*renamed)] = Stored(name, transposed)
    return found
