"""The small files of an export: one directory that onnxruntime-genai, transformers.js and optimum all load.

Settings that every consumer must agree on are written into each consumer's own file: the context, the end-of-text
tokens, where the graph is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acip_export.artifacts.plan import Serving
from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.io.atomic import read_json_object
from acip_export.io.frozen import thawed
from acip_export.io.stamps import Stamp, stamp_of
from acip_export.model.chat_template import find_chat_template
from acip_export.model.checkpoint import TOKENIZER_FILES, Checkpoint
from acip_export.model.encoder import sentence_files
from acip_export.model.tokenizer_files import (
    begins_texts,
    flags_sentence,
    lost_normalizer,
    resolved_normalizer,
    tokens_with,
)
from converters.onnx.backends import PROVIDERS, ROUNDED_CACHES
from converters.onnx.genai_builder.families import genai_type

MODEL_FILE = "onnx/model.onnx"
# transformers.js looks for exactly this suffix.
DATA_FILE = "onnx/model.onnx_data"
GENAI_CONFIG = "genai_config.json"

_TRANSFORMERS_JS = {"dtype": "fp32", "use_external_data_format": {Path(MODEL_FILE).name: 1}}
_GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER = "tokenizer.json"
# transformers 5 writes a class name that its predecessors refuse to load.
_NEW_TOKENIZER_CLASS, _OLD_TOKENIZER_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def small_files(source: Checkpoint, serving: Serving) -> dict[str, bytes | Path]:
    """Every file but the graph and its data: its bytes, or the file to copy.

    Args:
        source: the model directory, or the bundle made of it; both give the same files.

    Raises:
        UnsupportedError: there is no ``tokenizer.json``, or no end-of-text token.
        CheckpointError: a file is damaged.
    """
    tokenizer = source.path / _TOKENIZER
    if not tokenizer.is_file():
        raise UnsupportedError(
            f"{source.path} has no tokenizer.json, which onnxruntime-genai needs; save one with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    if not source.shape.generates:
        return _encoder_files(source, serving)
    generation = _read(source.path / _GENERATION_CONFIG)
    tokens = _tokenizer_config(_read(source.path / _TOKENIZER_CONFIG), serving)
    template = find_chat_template(source.path, tokens)
    if not _begins_texts(tokenizer, stamp_of(tokenizer)):
        # genai believes this key, and takes it for true in a Llama's tokenizer; transformers has only tokenizer.json.
        tokens["add_bos_token"] = False
    if template is not None:
        tokens["chat_template"] = template  # transformers.js reads no other file
    special = _special_tokens(source.config, generation, tokens, _added_tokens(tokenizer))
    files: dict[str, bytes | Path] = {
        name: source.path / name for name in TOKENIZER_FILES if (source.path / name).is_file()
    }
    files["config.json"] = _json(_config(source.config, serving))
    files[GENAI_CONFIG] = _json(_genai_config(source, generation, special, serving))
    files[_TOKENIZER_CONFIG] = _json(tokens)
    if _GENERATION_CONFIG not in files:
        files[_GENERATION_CONFIG] = _json({"_from_model_config": True, **special})
    return dict(sorted(files.items()))


def tokenizer_notes(model: Path) -> tuple[str, ...]:
    """Return a sentence for each way in which onnxruntime-genai's tokenizer is not the model's."""
    tokenizer = _read(model / _TOKENIZER)
    notes = []
    kind = lost_normalizer(tokenizer)
    if kind is not None:
        notes.append(
            f"the tokenizer normalizes its input ({kind}), which onnxruntime-genai does not do; transformers.js and "
            "optimum do: normalize texts before they go to onnxruntime-genai"
        )
    odd = tokens_with(tokenizer, ("single_word", "lstrip", "normalized"))
    if odd:
        notes.append(flags_sentence("onnxruntime-genai", odd))
    return tuple(notes)


def _encoder_files(source: Checkpoint, serving: Serving) -> dict[str, bytes | Path]:
    """For encoders: nothing generates, and sentence-transformers' files tell others how to pool."""
    names = [name for name in (*TOKENIZER_FILES, *sentence_files(source.path)) if name != _GENERATION_CONFIG]
    files: dict[str, bytes | Path] = {name: source.path / name for name in names if (source.path / name).is_file()}
    files["config.json"] = _json({**source.config, "transformers.js_config": _TRANSFORMERS_JS})
    options = _read(source.path / _TOKENIZER_CONFIG)
    files[_TOKENIZER_CONFIG] = _json(_tokenizer_config(options, serving))
    tokenizer = _read(source.path / _TOKENIZER)
    resolved = resolved_normalizer(tokenizer, options)
    if resolved is not tokenizer:  # transformers.js reads no other file
        files[_TOKENIZER] = _json(resolved)
    return dict(sorted(files.items()))


def _config(config: Mapping[str, Any], serving: Serving) -> dict[str, Any]:
    # The rotary tables end there.
    shortened = {**config, "max_position_embeddings": serving.context}
    if serving.cache_type_k in ROUNDED_CACHES:  # which transformers.js cannot make
        return shortened
    half = {"kv_cache_dtype": "float16"} if serving.cache_type_k == "f16" else {}
    return {**shortened, "transformers.js_config": {**_TRANSFORMERS_JS, **half}}


def _tokenizer_config(config: Mapping[str, Any], serving: Serving) -> dict[str, Any]:
    name = config.get("tokenizer_class", _NEW_TOKENIZER_CLASS)
    return {
        **config,
        "model_max_length": serving.context,
        "tokenizer_class": _OLD_TOKENIZER_CLASS if name == _NEW_TOKENIZER_CLASS else name,
    }


def _special_tokens(
    config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Mapping[str, Any], ids: Mapping[str, int]
) -> dict[str, Any]:
    """Token ids, generation settings first, then the model's, then the tokenizer's.

    A chat model ends its turns with the tokenizer's end-of-text token even where the model's config names another one,
    so both end a generation.
    """

    def resolve(role: str) -> Any:
        for source in (generation, config):
            if source.get(f"{role}_token_id") is not None:
                return source[f"{role}_token_id"]
        return ids.get(_token_text(tokenizer.get(f"{role}_token")))

    found = resolve("eos")
    ends: list[int] = list(found) if isinstance(found, tuple) else [] if found is None else [found]
    of_tokenizer = ids.get(_token_text(tokenizer.get("eos_token")))
    if of_tokenizer is not None and of_tokenizer not in ends:
        ends = [of_tokenizer, *ends]
    if not ends:
        raise UnsupportedError("neither the model nor its tokenizer names an end-of-text token; set eos_token_id")
    pad, bos = resolve("pad"), resolve("bos")
    pad = ends[0] if pad is None else pad
    return {
        "bos_token_id": pad if bos is None else bos,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": pad,
    }


def _token_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _genai_config(
    source: Checkpoint, generation: Mapping[str, Any], special: Mapping[str, Any], serving: Serving
) -> dict[str, Any]:
    shape = source.shape
    return {
        "model": {
            **special,
            "context_length": serving.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": _providers(serving)},
                "filename": MODEL_FILE,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": shape.heads,
                "num_hidden_layers": shape.layers,
                "num_key_value_heads": shape.kv_heads,
            },
            # A name that makes it run the graph as a plain decoder.
            "type": genai_type(source.config),
            "vocab_size": shape.vocabulary,
        },
        "search": {
            # Prompts are processed in pieces of this many tokens: it bounds the activations and the logits.
            "chunk_size": serving.prompt_batch,
            "do_sample": bool(generation.get("do_sample", False)),
            "early_stopping": True,
            "max_length": serving.context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            # One KV cache of max_length, allocated once and written in place; plain attention returns a longer one.
            "past_present_share_buffer": shape.fused_attention,
            "repetition_penalty": float(generation.get("repetition_penalty") or 1.0),
            "temperature": float(generation.get("temperature") or 1.0),
            "top_k": int(generation.get("top_k") or 50),
            "top_p": float(generation.get("top_p") or 1.0),
        },
    }


def _providers(serving: Serving) -> list[dict[str, dict[str, str]]]:
    provider = PROVIDERS.get(serving.backend)
    return [] if provider is None else [{provider: {}}]


def _read(file: Path) -> Mapping[str, Any]:
    return read_json_object(file, CheckpointError) if file.is_file() else {}


@functools.lru_cache(maxsize=8)
def _begins_texts(file: Path, stamp: Stamp | None) -> bool:  # noqa: ARG001 - part of the key
    try:
        return begins_texts(_read(file))
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{file} is no tokenizer: its post_processor is malformed ({error!r})") from error


def _added_tokens(file: Path) -> dict[str, int]:
    return _added_tokens_of(file, stamp_of(file))


@functools.lru_cache(maxsize=8)
def _added_tokens_of(file: Path, stamp: Stamp | None) -> dict[str, int]:  # noqa: ARG001 - part of the key
    """Ids of the tokens outside the merges; a real vocabulary takes half a second to parse, and planning asks often."""
    try:
        return {str(token["content"]): int(token["id"]) for token in _read(file).get("added_tokens", [])}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is no tokenizer: its added_tokens are malformed ({error!r})") from error


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(thawed(data), indent=2, ensure_ascii=False) + "\n").encode()
