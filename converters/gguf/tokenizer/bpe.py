"""Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM, OLMo 2, Granite, Mistral's Tekken).

llama.cpp does not store the pre-tokenizer's pattern but a name (``tokenizer.ggml.pre``) for patterns compiled into it.
The name is found here by the pattern itself, so that a retrained vocabulary works as well; llama.cpp's own converter
hashes the tokens of a test string instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from acip_export.errors import UnsupportedError
from acip_export.model.split_patterns import GPT2, GPT4O, LLAMA3, QWEN2, QWEN35, TEKKEN
from converters.gguf.tokenizer.common import (
    Source,
    TokenType,
    added_type,
    model_kind,
    padded_tokens,
    special_keys,
    steps,
    token_keys,
)
from converters.gguf.writer import Metadata, strings

logger = logging.getLogger(__name__)

_DIGIT = r"\p{N}"

# (patterns in order of application, whether whole words skip the merges) -> name in llama.cpp (llama-vocab.cpp).
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",  # the same pattern in a variant that does not skip merges
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((GPT2,), False): "gpt-2",
    ((_DIGIT, GPT2), False): "smollm",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
}
# llama.cpp's expressions for these tell no combining marks from other characters.
APPROXIMATE = ("tekken", "gpt-4o")
PRE_TOKENIZERS = tuple(sorted(_PRE_TOKENIZERS.values()))


def bpe_metadata(source: Source, pre: str | None) -> Metadata:
    """The ``tokenizer.*`` keys; ``pre`` overrides the pre-tokenizer's name.

    Raises:
        UnsupportedError: llama.cpp would tokenize differently.
    """
    normalizer = (source.tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp does not normalize; text in the wild is NFC
        raise UnsupportedError(f"the tokenizer normalizes its input ({normalizer}), which llama.cpp would not do")
    by_id = {int(number): (token, TokenType.NORMAL) for token, number in source.model["vocab"].items()}
    for added in source.tokenizer.get("added_tokens", ()):
        by_id[int(added["id"])] = (added["content"], added_type(added))
    tokens, types = padded_tokens(by_id, source.vocabulary)
    return {
        **model_kind("gpt2", pre or _pre_tokenizer(source)),
        **token_keys(tokens, types),
        "tokenizer.ggml.merges": strings(merges(source.model)),
        **special_keys(source, tokens, types, bos_falls_back=True),
    }


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    found = steps(tokenizer.get("pre_tokenizer"))
    return bool(found) and found[-1]["type"] == "ByteLevel" and not tokenizer["model"].get("byte_fallback")


def merges(model: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _pre_tokenizer(source: Source) -> str:
    patterns = _patterns(source.tokenizer["pre_tokenizer"])
    whole_words = bool(source.model.get("ignore_merges"))
    name = _PRE_TOKENIZERS.get((patterns, whole_words))
    if name is None:
        found = " then ".join(patterns)
        closest = max(_PRE_TOKENIZERS, key=lambda known: SequenceMatcher(None, " then ".join(known[0]), found).ratio())
        raise UnsupportedError(
            f"llama.cpp has no pre-tokenizer for the pattern {found!r} (ignore_merges={whole_words}); the closest is "
            f"{_PRE_TOKENIZERS[closest]!r}: {' then '.join(closest[0])!r} (ignore_merges={closest[1]}).\n"
            f"To use it all the same, or any other that llama.cpp has:  --pre-tokenizer {_PRE_TOKENIZERS[closest]}"
        )
    if name in APPROXIMATE:
        logger.warning("llama.cpp's pre-tokenizer %r splits words with combining marks (Hindi, Thai) differently", name)
    return name


def _patterns(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """What splits the text, in order, as regular expressions."""
    patterns: list[str] = []
    for step in steps(pre_tokenizer):
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert") and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(_DIGIT)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [GPT2] if step.get("use_regex", True) else []
        else:
            raise UnsupportedError(f"the tokenizer's pre-tokenizer step {dict(step)} has no counterpart in llama.cpp")
    return tuple(patterns)
