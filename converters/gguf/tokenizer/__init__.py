"""A model's tokenizer as GGUF keys. One file per kind; ``tokenizer.json`` decides, as it does in transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from acip_export.errors import CheckpointError, ModelFileError, UnsupportedError
from acip_export.io.atomic import read_json_object
from acip_export.io.frozen import thawed
from acip_export.io.inputs import read_foreign_json, read_json
from acip_export.io.stamps import Stamp, stamp_of
from acip_export.model.chat_template import TEMPLATE_FILE, find_chat_template
from acip_export.model.tokenizer_files import flags_sentence, resolved_normalizer, tokens_with
from converters.gguf.tokenizer.bpe import bpe_metadata, is_byte_level
from converters.gguf.tokenizer.common import Source, end_keys
from converters.gguf.tokenizer.sentencepiece import model_file_metadata, sentencepiece_metadata
from converters.gguf.tokenizer.wordpiece import wordpiece_metadata
from converters.gguf.writer import Metadata, string

logger = logging.getLogger(__name__)

_GENERATION_CONFIG = "generation_config.json"
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", TEMPLATE_FILE, _GENERATION_CONFIG)
# Phi 3's special tokens that leave the text after them alone (llama-vocab.cpp).
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


def tokenizer_metadata(model: Path, config: Mapping[str, Any], vocabulary: int, pre: str | None = None) -> Metadata:
    """The ``tokenizer.*`` keys. Cached: a plan asks for them many times.

    Args:
        vocabulary: rows of the embedding; the tokens are padded to it.
        pre: llama.cpp's name of the pre-tokenizer, in place of the recognised one.

    Raises:
        CheckpointError: neither ``tokenizer.json`` nor ``tokenizer.model``, or a damaged one.
        UnsupportedError: llama.cpp would tokenize differently.
    """
    stamps = tuple(stamp_of(model / name) for name in _FILES)
    if stamps[0] is None and stamps[1] is None:
        raise CheckpointError(
            f"{model} has no tokenizer.json or tokenizer.model; save the tokenizer with transformers' save_pretrained"
        )
    ids = json.dumps(thawed({key: config.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}))
    return _metadata(model, ids, vocabulary, pre, stamps)


class _AddedToken(msgspec.Struct, frozen=True):
    """Of ``added_tokens``: the text, and whether it swallows the blanks after it."""

    content: str
    rstrip: bool = False


class _Tokenizer(msgspec.Struct, frozen=True):
    """What the model's name depends on in ``tokenizer.json``."""

    added_tokens: tuple[_AddedToken, ...] = ()


def strips_after_special(model: Path) -> bool:
    """Whether special tokens swallow the blanks after them, in the one way that llama.cpp knows: Phi 3's.

    llama.cpp does so for models whose name says Phi 3, and refuses to load one that then lacks a token of Phi 3's.
    """
    file = model / "tokenizer.json"
    stamp = stamp_of(file)
    return stamp is not None and _strips_after_special(file, stamp)


@lru_cache(maxsize=4)
def _strips_after_special(file: Path, stamp: Stamp) -> bool:  # noqa: ARG001 - part of the key
    added = {token.content: token for token in read_json(file, _Tokenizer, CheckpointError).added_tokens}
    others = [token for content, token in added.items() if content not in _PHI3_PLAIN]
    return added.keys() >= {*_PHI3_PLAIN, "</s>"} and all(token.rstrip for token in others)


@lru_cache(maxsize=4)
def _metadata(
    model: Path, config_ids: str, vocabulary: int, pre: str | None, stamps: tuple[Stamp | None, ...]
) -> Metadata:
    options = {} if stamps[2] is None else read_json_object(model / "tokenizer_config.json", CheckpointError)
    file = model / ("tokenizer.model" if stamps[0] is None else "tokenizer.json")
    tokenizer = {} if stamps[0] is None else read_foreign_json(file, CheckpointError)
    source = Source(resolved_normalizer(tokenizer, options), options, json.loads(config_ids), vocabulary)
    try:
        metadata = dict(model_file_metadata(file, source) if stamps[0] is None else _by_kind(source, pre))
    except (KeyError, TypeError, ValueError, AttributeError, ModelFileError) as error:
        raise CheckpointError(f"{file} is damaged or of an unknown form: {error!r}") from error
    flags = ("single_word", "lstrip", *([] if strips_after_special(model) else ["rstrip"]), "normalized")
    odd = tokens_with(tokenizer, flags)
    if odd:
        logger.warning("%s", flags_sentence("llama.cpp", odd))
    generation = {} if stamps[4] is None else read_json_object(model / _GENERATION_CONFIG, CheckpointError)
    metadata |= end_keys(generation.get("eos_token_id"), source, metadata)
    template = find_chat_template(model, options)
    if template:
        metadata["tokenizer.chat_template"] = string(template)
    return metadata


def _by_kind(source: Source, pre: str | None) -> Metadata:
    kind = source.model.get("type", "BPE")
    if kind == "BPE" and is_byte_level(source.tokenizer):
        return bpe_metadata(source, pre)
    if pre is not None:
        raise UnsupportedError("--pre-tokenizer is for byte-level BPE, and the model's tokenizer is another kind")
    if kind == "WordPiece":
        return wordpiece_metadata(source)
    if kind == "Unigram" or (kind == "BPE" and source.model.get("byte_fallback")):
        return sentencepiece_metadata(source)
    raise UnsupportedError(
        f"the tokenizer is a {kind} that llama.cpp does not have; the GGUF converter writes byte-level BPE (Llama 3, "
        "Qwen, GPT-2, SmolLM), SentencePiece (Llama 2, Mistral, Gemma, Phi 3) and WordPiece (BERT)"
    )


__all__ = ["strips_after_special", "tokenizer_metadata"]
