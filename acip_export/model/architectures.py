"""What is known about architectures: one row for each ``model_type`` of transformers.

Tests compare every row with transformers' own configuration class. What one format's runtime needs to know beside this
is a row of that format's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from acip_export.model.task import EncoderKind
from acip_export.model.windows import (
    WindowRule,
    all_but_every,
    as_configured,
    every_layer,
    layers_without_positions,
    no_layer,
    upper_layers,
)

_NORMS = ("input_layernorm", "post_attention_layernorm")
_MORE_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Layer:
    """The tensors of a decoder's layer under transformers' names, beyond projections and their sizes.

    Attributes:
        norms: as wide as the hidden size. head_norms: of queries and keys, one head wide; ``whole``: of all heads.
        attention_bias, mlp_bias: keys of ``config.json`` that switch biases on; ``None``: none does.
        always_biased: projections with a bias whatever the configuration says.
        fused_projections: q, k and v are one matrix, gate and up another.
        plain_norms: q, k and v read what ``input_layernorm`` multiplies with its weights, gate and up what
            ``post_attention_layernorm`` does, and nothing else reads it.
    """

    norms: tuple[str, ...] = _NORMS
    head_norms: bool = False
    whole: bool = False
    attention_bias: str | None = "attention_bias"
    mlp_bias: str | None = None
    always_biased: tuple[str, ...] = ()
    fused_projections: bool = False
    plain_norms: bool = False

    @property
    def bias_keys(self) -> tuple[str, ...]:
        """Keys of ``config.json`` that switch biases on."""
        return tuple(key for key in (self.attention_bias, self.mlp_bias) if key is not None)


@dataclass(frozen=True)
class Rotary:
    """How a configuration describes rotary embeddings.

    Attributes:
        theta: base of the wavelengths where the configuration has none.
        local_theta: that of windowed layers where they have parameters of their own; ``None``: they have not.
        rotates_parts: ``partial_rotary_factor`` counts even where nothing scales the positions.
        original_length: default of ``original_max_position_embeddings`` where that is a field of the configuration,
            which then replaces what stands beside the factors.
        old_names: what early configurations called a kind.
    """

    theta: float = 10000.0
    local_theta: float | None = None
    rotates_parts: bool = False
    original_length: int | None = None
    old_names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """What is known about one ``model_type``; the fields' defaults hold for one of which nothing is.

    Attributes:
        classes: Hugging Face classes of models that are exported.
        encoders: those among them that encode: what for, and the prefix of the transformer's tensor names.
        defaults: values of keys that ``config.json`` may leave out.
        tied: the head is the embedding unless the configuration denies it.
        layer: the tensors of a layer; ``None``: transformers is asked.
        window: which layers are windowed where the configuration names a window.
        rotary: its rotary embeddings.
        fused_attention: an ONNX graph attends in one node per layer, in place on one cache: the model builder makes
            such nodes, and tracing does where transformers calls an exchangeable function.
        wide_ffn: the feed-forward layer is four times as wide as the hidden size where nothing else is written.
        multi_query: heads share one key and value unless the configuration denies it, whatever number it has.
        base_prefix: what tensors' names lack in checkpoints that were saved without their head.
        renamed: start of names that modules gave up, and what it is today.
        transposed: linear layers are transformers' Conv1D, which stores (in, out).
    """

    model_type: str
    classes: tuple[str, ...] = ()
    encoders: Mapping[str, tuple[EncoderKind, str]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    layer: Layer | None = None
    window: WindowRule = as_configured
    rotary: Rotary = Rotary()
    fused_attention: bool = False
    wide_ffn: bool = False
    multi_query: bool = False
    base_prefix: str = ""
    renamed: tuple[str, str] = ("", "")
    transposed: bool = False


_BERT: Mapping[str, tuple[EncoderKind, str]] = {
    "BertModel": ("embedding", ""),
    "BertForMaskedLM": ("masked-lm", "bert."),
    "BertForSequenceClassification": ("classification", "bert."),
}
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

_EXPORTED = (
    Architecture("bert", tuple(_BERT), _BERT, tied=True),
    Architecture(
        "ernie4_5",
        ("Ernie4_5ForCausalLM",),
        defaults={"head_dim": 128, "num_key_value_heads": 2, "max_position_embeddings": 131072},
        tied=True,
        layer=Layer(attention_bias="use_bias", mlp_bias="use_bias"),
        window=no_layer,
        rotary=Rotary(theta=500_000.0),
        fused_attention=True,
    ),
    Architecture(
        "gemma",
        ("GemmaForCausalLM",),
        defaults={"head_dim": 256, "num_key_value_heads": 16, "max_position_embeddings": 8192},
        tied=True,
        layer=Layer(),
        window=no_layer,
    ),
    Architecture(
        "gemma2",
        ("Gemma2ForCausalLM",),
        defaults={
            "head_dim": 256,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
        },
        tied=True,
        layer=Layer(norms=(*_NORMS, *_MORE_NORMS)),
        window=all_but_every(2),
        fused_attention=True,
    ),
    Architecture(
        "gemma3_text",
        ("Gemma3ForCausalLM",),
        defaults={
            "head_dim": 256,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        tied=True,
        layer=Layer(norms=(*_NORMS, *_MORE_NORMS), head_norms=True),
        window=all_but_every(6, "sliding_window_pattern"),
        rotary=Rotary(theta=1_000_000.0, local_theta=10000.0),
        fused_attention=True,
    ),
    Architecture(
        "granite",
        ("GraniteForCausalLM",),
        layer=Layer(mlp_bias="mlp_bias", plain_norms=True),
        window=no_layer,
        fused_attention=True,
    ),
    Architecture(
        "llama",
        ("LlamaForCausalLM",),
        layer=Layer(mlp_bias="mlp_bias", plain_norms=True),
        window=no_layer,
        fused_attention=True,
    ),
    Architecture(
        "mistral",
        ("MistralForCausalLM",),
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        layer=Layer(attention_bias=None, plain_norms=True),
        window=every_layer,
        fused_attention=True,
    ),
    Architecture(
        "olmo2",
        ("Olmo2ForCausalLM",),
        layer=Layer(norms=("post_attention_layernorm", "post_feedforward_layernorm"), head_norms=True, whole=True),
        window=no_layer,
        fused_attention=True,
    ),
    Architecture(
        "phi3",
        ("Phi3ForCausalLM",),
        defaults={"max_position_embeddings": 4096},
        layer=Layer(attention_bias=None, fused_projections=True),
        window=every_layer,
        rotary=Rotary(rotates_parts=True, original_length=4096, old_names={"su": "longrope", "yarn": "longrope"}),
        fused_attention=True,
    ),
    Architecture(
        "qwen2",
        ("Qwen2ForCausalLM",),
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, **_QWEN_WINDOWS},
        layer=Layer(attention_bias=None, always_biased=("q_proj", "k_proj", "v_proj"), plain_norms=True),
        window=upper_layers,
        fused_attention=True,
    ),
    Architecture(
        "qwen3",
        ("Qwen3ForCausalLM",),
        defaults={"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768, **_QWEN_WINDOWS},
        layer=Layer(head_norms=True, plain_norms=True),
        window=upper_layers,
        fused_attention=True,
    ),
    Architecture(
        "smollm3",
        ("SmolLM3ForCausalLM",),
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
        },
        tied=True,
        layer=Layer(mlp_bias="mlp_bias", plain_norms=True),
        window=layers_without_positions,
        rotary=Rotary(theta=2_000_000.0),
        fused_attention=True,
    ),
)

# Models whose ONNX graph is traced, and which have something that is not as in most.
_TRACED = (
    Architecture("bloom", tied=True, wide_ffn=True, base_prefix="transformer."),
    Architecture("codegen", wide_ffn=True),
    Architecture("cohere", tied=True, fused_attention=True),
    Architecture("falcon", tied=True, wide_ffn=True, multi_query=True),
    Architecture("gpt2", tied=True, fused_attention=True, wide_ffn=True, base_prefix="transformer.", transposed=True),
    Architecture("gpt_bigcode", tied=True, wide_ffn=True, multi_query=True),
    Architecture("gpt_neo", tied=True, wide_ffn=True),
    Architecture("gpt_neox", fused_attention=True, renamed=("embed_out.", "lm_head.")),
    Architecture("gptj", wide_ffn=True),
    Architecture("openai-gpt", tied=True, wide_ffn=True, base_prefix="transformer.", transposed=True),
    Architecture("opt", tied=True, fused_attention=True, base_prefix="model."),
    Architecture("stablelm", fused_attention=True),
)

# Further models with a causal head that is the embedding unless config.json denies it.
_TIED = """
    bart bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small camembert cohere2 cohere2_moe
    cohere_compass_text cpmant ctrl data2vec-text electra ernie ernie4_5_moe falcon_mamba gemma3 gemma3n
    gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text got_ocr2 gpt-sw3
    gpt_neox_japanese granite_swa jetmoe lfm2 lfm2_moe lfm3 mamba marian mbart megatron-bert minicpm3
    modernbert-decoder moss_transcribe_diarize mpt mvp pegasus plbart prophetnet recurrent_gemma roberta
    roberta-prelayernorm roc_bert roformer starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta xlm-roberta-xl
    xlnet xmod youtu zamba zamba2 zaya
"""

ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row for row in (*_EXPORTED, *_TRACED, *(Architecture(kind, tied=True) for kind in _TIED.split()))
}
"""All rows by ``model_type``."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the row of a ``config.json``; of an unknown ``model_type``, one that knows nothing."""
    kind = str(config.get("model_type"))
    return ARCHITECTURES.get(kind) or Architecture(kind)
