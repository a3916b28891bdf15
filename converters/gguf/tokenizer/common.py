"""What the kinds of tokenizers share: token types, special tokens, the templates around a text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from acip_export.errors import UnsupportedError
from converters.gguf.writer import Value, boolean, int32s, string, strings, uint32


class TokenType(IntEnum):
    """enum llama_token_type (llama.h)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


logger = logging.getLogger(__name__)

# Texts of tokens at which llama.cpp ends an answer by itself (llama-vocab.cpp); a test asks it.
ENDS_BY_NAME = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "<|end_of_text|>")
)
_MORE_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


@dataclass(frozen=True)
class Source:
    """The files of a tokenizer, read.

    Attributes:
        tokenizer: ``tokenizer.json``. options: ``tokenizer_config.json`` or empty.
        config_ids: ids of special tokens by ``config.json``: bos, eos, pad.
        vocabulary: rows of the embedding.
    """

    tokenizer: Mapping[str, Any]
    options: Mapping[str, Any]
    config_ids: Mapping[str, Any]
    vocabulary: int

    @property
    def model(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.tokenizer["model"]
        return found


def padded_tokens(
    by_id: Mapping[int, tuple[str, TokenType]], vocabulary: int
) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    """Every token by id and its type, padded to ``vocabulary``.

    Raises:
        UnsupportedError: more tokens than embeddings.
    """
    if by_id and max(by_id) >= vocabulary:
        raise UnsupportedError(f"the tokenizer has token {max(by_id)}, but the model has {vocabulary} embeddings only")
    rows = [by_id.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(vocabulary)]
    return tuple(token for token, _ in rows), tuple(kind for _, kind in rows)


def added_type(added: Mapping[str, Any]) -> TokenType:
    return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED


def token_keys(tokens: tuple[str, ...], types: tuple[TokenType, ...]) -> dict[str, Value]:
    return {"tokenizer.ggml.tokens": strings(tokens), "tokenizer.ggml.token_type": int32s(types)}


def special_keys(
    source: Source, tokens: tuple[str, ...], types: tuple[TokenType, ...], bos_falls_back: bool
) -> dict[str, Value]:
    """Ids of the special tokens that the runtime acts on, and whether texts are wrapped in them.

    Args:
        bos_falls_back: the end-of-text token stands in for a beginning-of-text token that the model does not have:
            without the key llama.cpp takes token 11 of a byte-level BPE.

    Raises:
        UnsupportedError: texts are wrapped in more than one token on a side.
    """
    prefix, suffix = template(source.tokenizer.get("post_processor"))
    ids = {token: index for index, token in enumerate(tokens)}

    def find(name: str) -> int | None:
        token = source.options.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str) and token in ids:
            return ids[token]
        number = source.config_ids.get(name)
        number = number[0] if isinstance(number, (list, tuple)) and number else number
        return int(number) if isinstance(number, int) and 0 <= number < len(tokens) else None

    eos = ids[suffix] if suffix is not None else find("eos")
    bos = ids[prefix] if prefix is not None else find("bos")
    if bos is None and bos_falls_back:
        bos = eos
    unknown = types.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in types else find("unk")
    found = {"bos": bos, "eos": eos, "unknown": unknown, "padding": find("pad")}
    return {
        **{f"tokenizer.ggml.{key}_token_id": uint32(number) for key, number in found.items() if number is not None},
        "tokenizer.ggml.add_bos_token": boolean(prefix is not None),
        "tokenizer.ggml.add_eos_token": boolean(suffix is not None),
    }


def end_keys(generation_ends: Any, source: Source, metadata: Mapping[str, Value]) -> dict[str, Value]:
    """Tokens that end an answer beside the end-of-text token: llama.cpp has two more keys, and names that it knows.

    Args:
        generation_ends: ``eos_token_id`` of ``generation_config.json``: nothing, a number or several.
        metadata: the tokenizer's keys so far.
    """
    written = metadata.get("tokenizer.ggml.eos_token_id")
    texts = _texts(source)
    ends = dict.fromkeys((*_numbers(generation_ends), *_numbers(source.config_ids.get("eos"))))
    others = [number for number in ends if uint32(number) != written and texts.get(number) not in ENDS_BY_NAME]
    if len(others) > len(_MORE_ENDS):
        logger.warning(
            "llama.cpp has keys for %d ends of an answer beside end-of-text; it will not stop at %s",
            len(_MORE_ENDS),
            ", ".join(repr(texts.get(number, number)) for number in others[len(_MORE_ENDS) :]),
        )
    return {key: uint32(number) for key, number in zip(_MORE_ENDS, others, strict=False)}


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [number for number in values if isinstance(number, int)]


def _texts(source: Source) -> dict[int, str]:
    """Added tokens by number, wherever they are named: ends of answers are among them."""
    named = dict(source.options.get("added_tokens_decoder") or {})
    found = {int(number): str(token.get("content")) for number, token in named.items()}
    return found | {int(token["id"]): token["content"] for token in source.tokenizer.get("added_tokens") or ()}


def template(post_processor: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """Special tokens that are put before and after every text.

    Raises:
        UnsupportedError: more than one on a side, or a post-processor that llama.cpp does not have.
    """
    if post_processor is None:
        return None, None
    before: list[str] = []
    after: list[str] = []
    for step in post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]:
        if step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            raise UnsupportedError(f"the tokenizer's post-processor {step['type']} has no counterpart in llama.cpp")
        side = before
        for piece in step["single"]:
            if "Sequence" in piece:
                side = after
            else:
                side.append(piece["SpecialToken"]["id"])
    if len(before) > 1 or len(after) > 1:
        raise UnsupportedError(f"the tokenizer wraps text in {before + after}; llama.cpp adds one token on each side")
    return (before[0] if before else None), (after[0] if after else None)


def steps(pre_tokenizer: Mapping[str, Any] | None, inner: str = "pretokenizers") -> list[Mapping[str, Any]]:
    """The parts of a pre-tokenizer or normalizer (``inner``: ``normalizers``) that may be a sequence."""
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer[inner]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def model_kind(name: str, pre: str) -> dict[str, Value]:
    return {"tokenizer.ggml.model": string(name), "tokenizer.ggml.pre": string(pre)}
