"""BERT: embeddings and classification. llama.cpp has no head over tokens for it, so no masked language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import ModelShape
from acip_export.model.encoder import Encoder
from converters.gguf.architectures.base import ATTENTION, ATTENTION_BIASES, TOKEN_EMBEDDING, Family
from converters.gguf.architectures.rope import Floats
from converters.gguf.writer import Metadata, boolean, float32, strings, uint32

_NORMS = tuple(f"{name}.{kind}" for name in ("attn_output_norm", "layer_output_norm") for kind in ("weight", "bias"))
_FFN = ("ffn_up.weight", "ffn_up.bias", "ffn_down.weight", "ffn_down.bias")
_OUTER = (
    TOKEN_EMBEDDING,
    "position_embd.weight",
    "token_types.weight",
    "token_embd_norm.weight",
    "token_embd_norm.bias",
)
# The pooler's dense layer and tanh, then the labels: llama.cpp's classifier head.
_HEAD = {
    "bert.pooler.dense.weight": "cls.weight",
    "bert.pooler.dense.bias": "cls.bias",
    "classifier.weight": "cls.output.weight",
    "classifier.bias": "cls.output.bias",
}
# enum llama_pooling_type (llama.h).
_POOLING = {"mean": 1, "cls": 2}
_RANK = 4


@dataclass(frozen=True)
class BertFamily(Family):
    """Encoders with learned positions, biases everywhere and norms after the sums."""

    def tensor_names(self, names: Iterable[str], shape: ModelShape) -> dict[str, str]:
        names = list(names)
        if shape.architecture == "BertForMaskedLM":
            raise UnsupportedError(
                "llama.cpp has no head over tokens for BERT: a masked language model exports with  --format onnx"
            )
        head = {name: _HEAD[name] for name in names if name in _HEAD}
        body = {name.removeprefix("bert."): name for name in names if name not in _HEAD}
        mapped = super().tensor_names(body, shape)
        return {**{body[name]: found for name, found in mapped.items()}, **head}

    def _required(self, shape: ModelShape) -> set[str]:
        layers = {f"blk.{layer}.{name}" for layer in range(shape.layers) for name in self.layer}
        return {*_OUTER, *layers}

    def _optional(self, shape: ModelShape) -> set[str]:
        del shape
        return set()

    def hyperparameters(self, config: Mapping[str, Any], shape: ModelShape) -> Metadata:
        self.check(config, shape)
        keys = {
            "context_length": uint32(shape.max_context),
            "embedding_length": uint32(shape.hidden),
            "block_count": uint32(shape.layers),
            "feed_forward_length": uint32(shape.ffn),
            "attention.head_count": uint32(shape.heads),
            "attention.layer_norm_epsilon": float32(float(config.get("layer_norm_eps", 1e-12))),
            "attention.causal": boolean(False),
            "vocab_size": uint32(shape.vocabulary),
        }
        labels = config.get("id2label")
        if shape.architecture == "BertForSequenceClassification" and labels:
            keys["classifier.output_labels"] = strings([labels[key] for key in sorted(labels, key=int)])
        return {f"{self.name}.{key}": value for key, value in keys.items()}

    def encoder_keys(self, encoder: Encoder, config: Mapping[str, Any]) -> Metadata:
        """How llama.cpp makes one vector of a text, and the kinds of its tokens.

        Raises:
            UnsupportedError: a pooling that llama.cpp has not.
        """
        types = {"tokenizer.ggml.token_type_count": uint32(int(config.get("type_vocab_size", 2)))}
        if encoder.pooling is None:
            return {f"{self.name}.pooling_type": uint32(_RANK), **types}
        if encoder.pooling.mode not in _POOLING:
            raise UnsupportedError(
                f"llama.cpp pools by {' or '.join(_POOLING)}, this model by {encoder.pooling.mode}; use  --format onnx"
            )
        return {f"{self.name}.pooling_type": uint32(_POOLING[encoder.pooling.mode]), **types}

    def check(self, config: Mapping[str, Any], shape: ModelShape) -> None:
        del shape
        activation = config.get("hidden_act", "gelu")
        if activation not in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
            raise UnsupportedError(f"llama.cpp's 'bert' computes gelu, config.json asks for {activation!r}")
        if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
            raise UnsupportedError("llama.cpp's 'bert' has learned positions and attends in both directions")

    def constants(self, config: Mapping[str, Any], shape: ModelShape) -> dict[str, Floats]:
        del config, shape
        return {}


FAMILY = BertFamily(
    name="bert",
    classes=("BertModel", "BertForMaskedLM", "BertForSequenceClassification"),
    layer=(*ATTENTION, *ATTENTION_BIASES, *_NORMS, *_FFN),
)
