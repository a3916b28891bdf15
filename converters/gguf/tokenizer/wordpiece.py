"""WordPiece, the tokenizer of BERT.

llama.cpp has one WordPiece: it lower-cases, strips accents, sets punctuation and Chinese characters apart, and matches
words greedily. Pieces that start a word carry U+2581 in the file; ``tokenizer.json`` marks those that go on, by ``##``.
Composed letters are taken apart only as far as their base, so that Hangul and Devanagari come out differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from acip_export.errors import UnsupportedError
from converters.gguf.tokenizer.common import Source, TokenType, added_type, padded_tokens, token_keys
from converters.gguf.writer import Metadata, Value, boolean, string, uint32

_CONTINUES, _STARTS = "##", "\u2581"
# Key in GGUF -> name of the token in tokenizer_config.json.
_SPECIAL = {
    "bos": "cls_token",
    "unknown": "unk_token",
    "seperator": "sep_token",  # llama.cpp's spelling
    "padding": "pad_token",
    "mask": "mask_token",
}


def wordpiece_metadata(source: Source) -> Metadata:
    """The ``tokenizer.*`` keys.

    Raises:
        UnsupportedError: llama.cpp would tokenize differently.
    """
    _check(source)
    by_id = {int(number): (_marked(token), TokenType.NORMAL) for token, number in source.model["vocab"].items()}
    ids = {token: int(number) for token, number in source.model["vocab"].items()}
    for added in source.tokenizer.get("added_tokens", ()):
        by_id[int(added["id"])] = (added["content"], added_type(added))
        ids[added["content"]] = int(added["id"])
    special: dict[str, Value] = {
        f"tokenizer.ggml.{key}_token_id": uint32(number)
        for key, name in _SPECIAL.items()
        if (number := _id_of(source.options.get(name), ids)) is not None
    }
    return {
        "tokenizer.ggml.model": string("bert"),
        "tokenizer.ggml.pre": string("default"),
        **token_keys(*padded_tokens(by_id, source.vocabulary)),
        **special,
        "tokenizer.ggml.add_bos_token": boolean(True),
        "tokenizer.ggml.add_eos_token": boolean(False),
        "tokenizer.ggml.add_sep_token": boolean(True),
    }


def _check(source: Source) -> None:
    if source.model.get("continuing_subword_prefix", _CONTINUES) != _CONTINUES:
        raise UnsupportedError("the tokenizer does not mark its pieces by ##, as llama.cpp's WordPiece does")
    normalizer = source.tokenizer.get("normalizer") or {}
    strips, lowers = normalizer.get("strip_accents"), bool(normalizer.get("lowercase"))
    # Without a setting of its own, accents go when letters are lower-cased.
    if normalizer.get("type") != "BertNormalizer" or not lowers or strips is False:
        raise UnsupportedError(
            "llama.cpp's WordPiece lower-cases and strips accents, and this tokenizer does not "
            f"({normalizer.get('type')}, lowercase={lowers}, strip_accents={strips}); use  --format onnx"
        )
    if (source.tokenizer.get("pre_tokenizer") or {}).get("type") != "BertPreTokenizer":
        raise UnsupportedError("the tokenizer's pre-tokenizer is not BERT's, llama.cpp's only one for WordPiece")


def _marked(token: str) -> str:
    return token.removeprefix(_CONTINUES) if token.startswith(_CONTINUES) else _STARTS + token


def _id_of(token: Any, ids: Mapping[str, int]) -> int | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return ids.get(text) if isinstance(text, str) else None
