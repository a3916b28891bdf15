"""SentencePiece, from ``tokenizer.json`` (BPE with byte fallback, or Unigram) or from ``tokenizer.model``.

llama.cpp joins the pair of neighbours whose piece has the best score, whichever way the piece was put together. A
``tokenizer.json`` lists the pairs instead; its ranks become scores, and the pairs must be all that there are.
"""

from __future__ import annotations

import base64
import logging
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.inspection.protobuf import BYTES, Field, Message
from acip_export.io.inputs import read_input
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
from converters.gguf.writer import Metadata, Value, boolean, float32s, int8s

logger = logging.getLogger(__name__)

_SPACE = "▁"
# Pieces that no merge makes come last, so that they are not made here either as long as another one can be.
_NEVER = -1e6
# Share of the ways to put pieces together that tokenizer.json may lack before its merges are another algorithm.
_MISSING_MERGES = 0.01


def sentencepiece_metadata(source: Source) -> Metadata:
    """The ``tokenizer.*`` keys of a ``tokenizer.json`` that stands for a SentencePiece model.

    Raises:
        UnsupportedError: llama.cpp would tokenize differently.
    """
    unigram = source.model.get("type") == "Unigram"
    pieces = _unigram_pieces(source.model) if unigram else _bpe_pieces(source.model)
    tokens, types, scores = _with_added(pieces, source)
    kind = "t5" if unigram else "llama"
    if not unigram:
        _require_bytes(types)
    return {
        **model_kind(kind, "default"),
        **token_keys(tokens, types),
        "tokenizer.ggml.scores": float32s(scores),
        **special_keys(source, tokens, types, bos_falls_back=False),
        **(_unigram_whitespace(source.tokenizer) if unigram else _bpe_whitespace(source)),
    }


Pieces = dict[int, tuple[str, TokenType, float]]


def _bpe_pieces(model: Mapping[str, Any]) -> Pieces:
    vocabulary: Mapping[str, int] = model["vocab"]
    made: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made.setdefault(left + right, rank)
    ways = sum(
        piece[:cut] in vocabulary and piece[cut:] in vocabulary for piece in vocabulary for cut in range(1, len(piece))
    )
    missing = ways - len(model["merges"])
    if missing > _MISSING_MERGES * ways:
        raise UnsupportedError(
            f"the tokenizer has {len(model['merges'])} merges, but its pieces can be put together in {ways} ways, and "
            "llama.cpp tries all of them; it is no SentencePiece model, and llama.cpp would tokenize differently"
        )
    if missing > 0:
        logger.warning(
            "llama.cpp can join %d pairs of pieces that the tokenizer would not; most texts have none", missing
        )
    unknown = model.get("unk_token")
    return {
        int(number): (piece, _piece_type(piece, unknown), float(-made[piece]) if piece in made else _unmade(piece))
        for piece, number in vocabulary.items()
    }


def _unmade(piece: str) -> float:
    return 0.0 if len(piece) == 1 or _is_byte(piece) else _NEVER


def _unigram_pieces(model: Mapping[str, Any]) -> Pieces:
    _refuse_bytes(bool(model.get("byte_fallback")))
    unknown = model.get("unk_id")
    return {
        number: (piece, TokenType.UNKNOWN if number == unknown else TokenType.NORMAL, float(score))
        for number, (piece, score) in enumerate(model["vocab"])
    }


def _refuse_bytes(fallback: bool) -> None:
    if fallback:
        raise UnsupportedError("llama.cpp's unigram tokenizer has no byte fallback, the model's tokenizer has one")


def _piece_type(piece: str, unknown: str | None) -> TokenType:
    if piece == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if _is_byte(piece) else TokenType.NORMAL


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _with_added(pieces: Pieces, source: Source) -> tuple[tuple[str, ...], tuple[TokenType, ...], list[float]]:
    by_id = {number: (piece, kind) for number, (piece, kind, _) in pieces.items()}
    for added in source.tokenizer.get("added_tokens", ()):
        number, content = int(added["id"]), str(added["content"])
        # Looked for in the text as it is, where a blank is no "▁": only the merges can make such a piece.
        made_by_merges = number in by_id and _SPACE in content and not added["special"]
        if not made_by_merges and by_id.get(number, ("", None))[1] is not TokenType.UNKNOWN:
            by_id[number] = (content, added_type(added))
    tokens, types = padded_tokens(by_id, source.vocabulary)
    return tokens, types, [pieces[number][2] if number in pieces else _NEVER for number in range(source.vocabulary)]


def _require_bytes(types: Sequence[TokenType]) -> None:
    found = sum(kind is TokenType.BYTE for kind in types)
    if found != 256:
        raise UnsupportedError(
            f"the tokenizer has {found} of the 256 byte pieces <0x00> to <0xFF>, without which llama.cpp cannot "
            "tokenize unknown characters"
        )


def _bpe_whitespace(source: Source) -> dict[str, Value]:
    """Whether a blank is put before a text. llama.cpp does it after special tokens as well, and to any text."""
    tokenizer = source.tokenizer
    prefix, replaced = False, False
    for step in steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            replaced = True
        else:
            raise UnsupportedError(f"the tokenizer normalizes its input ({dict(step)}), which llama.cpp would not do")
    for step in steps(tokenizer.get("pre_tokenizer")):
        if step["type"] == "Metaspace" and step["replacement"] == _SPACE:
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            if step.get("split", True):
                _require_leading_spaces(source.model["vocab"])
            prefix, replaced = scheme != "never", True
            if prefix:
                where = "text that starts with a blank" + (" or follows a special token" if scheme == "first" else "")
                logger.warning("llama.cpp puts a blank before %s, the model's tokenizer does not", where)
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and replaced):
            raise UnsupportedError(f"the tokenizer's pre-tokenizer step {dict(step)} has no counterpart in llama.cpp")
    if not replaced:
        raise UnsupportedError("the tokenizer keeps blanks as they are; llama.cpp's SentencePiece replaces them by ▁")
    return {"tokenizer.ggml.add_space_prefix": boolean(prefix)}


def _require_leading_spaces(vocabulary: Mapping[str, int]) -> None:
    inside = next((piece for piece in vocabulary if _SPACE in piece[1:]), None)
    if inside is not None:
        raise UnsupportedError(
            f"the tokenizer splits text at blanks, which llama.cpp does not, and has pieces across them ({inside!r})"
        )


def _unigram_whitespace(tokenizer: Mapping[str, Any]) -> dict[str, Value]:
    """Normalization of a unigram model: its table of characters, and what becomes of blanks."""
    merged, stripped, prefix, keys = False, False, False, dict[str, Value]()
    for step in steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Precompiled":
            keys["tokenizer.ggml.precompiled_charsmap"] = int8s(base64.b64decode(step["precompiled_charsmap"]))
        elif step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}:
            merged = True
        elif step["type"] == "Strip" and not step["strip_left"]:
            stripped = True
        else:
            raise UnsupportedError(f"the tokenizer normalizes its input ({dict(step)}), which llama.cpp would not do")
    for step in steps(tokenizer.get("pre_tokenizer")):
        if step["type"] == "WhitespaceSplit":
            merged = stripped = True
        elif step["type"] == "Metaspace" and step["replacement"] == _SPACE:
            prefix = (
                step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            ) != "never"
        else:
            raise UnsupportedError(f"the tokenizer's pre-tokenizer step {dict(step)} has no counterpart in llama.cpp")
    if merged != stripped:
        logger.warning("llama.cpp drops blanks at the end of a text if it merges them, the model's tokenizer does not")
    return {
        "tokenizer.ggml.add_space_prefix": boolean(prefix),
        "tokenizer.ggml.remove_extra_whitespaces": boolean(merged),
        **keys,
    }


@dataclass(frozen=True)
class _ModelFile:
    """What matters of a ``tokenizer.model`` (sentencepiece_model.proto).

    Attributes:
        unigram: or BPE. charsmap: compiled normalization, empty for none.
        prefix: a blank is put before every text. merged: runs of blanks become one.
    """

    pieces: Pieces
    unigram: bool
    charsmap: bytes
    prefix: bool
    merged: bool


def model_file_metadata(file: Path, source: Source) -> Metadata:
    """The ``tokenizer.*`` keys of a ``tokenizer.model`` without a ``tokenizer.json``.

    Args:
        source: its ``tokenizer`` is empty; ``tokenizer_config.json`` adds tokens and says how texts are wrapped.

    Raises:
        CheckpointError: damaged. UnsupportedError: llama.cpp would tokenize differently.
    """
    model = _read_model_file(file)
    added = [{"id": number, **token} for number, token in (source.options.get("added_tokens_decoder") or {}).items()]
    pieces = {
        # Looked for in the text as it is, where a blank is no "▁".
        number: (piece.replace(_SPACE, " ") if kind is TokenType.USER_DEFINED else piece, kind, score)
        for number, (piece, kind, score) in model.pieces.items()
    }
    wrapped = Source(
        {"added_tokens": added, "post_processor": _wrapping(source)},
        source.options,
        source.config_ids,
        source.vocabulary,
    )
    tokens, types, scores = _with_added(pieces, wrapped)
    keys = {"tokenizer.ggml.add_space_prefix": boolean(model.prefix)}
    if model.unigram:
        _refuse_bytes(any(kind is TokenType.BYTE for _, kind, _ in model.pieces.values()))
        keys["tokenizer.ggml.remove_extra_whitespaces"] = boolean(model.merged)
        if model.charsmap:
            keys["tokenizer.ggml.precompiled_charsmap"] = int8s(model.charsmap)
    elif model.charsmap or model.merged:
        raise UnsupportedError(
            f"{file} normalizes its input or merges blanks, which llama.cpp's SentencePiece does not"
        )
    else:
        _require_bytes(types)
    return {
        **model_kind("t5" if model.unigram else "llama", "default"),
        **token_keys(tokens, types),
        "tokenizer.ggml.scores": float32s(scores),
        **special_keys(wrapped, tokens, types, bos_falls_back=False),
        **keys,
    }


def _wrapping(source: Source) -> dict[str, Any]:
    """The template of transformers' Llama tokenizer: a beginning-of-text token unless told otherwise."""

    def token(side: str, default: bool) -> list[dict[str, Any]]:
        found = source.options.get(f"{side}_token") or {"bos": "<s>", "eos": "</s>"}[side]
        content = found["content"] if isinstance(found, Mapping) else found
        return [{"SpecialToken": {"id": content}}] if source.options.get(f"add_{side}_token", default) else []

    return {"type": "TemplateProcessing", "single": [*token("bos", True), {"Sequence": {}}, *token("eos", False)]}


def _read_model_file(file: Path) -> _ModelFile:
    data = read_input(file, CheckpointError)
    message = Message(data, str(file), 0, len(data))
    pieces: Pieces = {}
    trainer, normalizer = dict[int, Field](), dict[int, Field]()
    for field in message.fields():
        if field.number == 1 and field.wire == BYTES:
            inner = {part.number: part for part in message.inner(field).fields()}
            number = inner[3].value if 3 in inner else int(TokenType.NORMAL)
            score = message.raw(inner[2]) if 2 in inner else bytes(4)
            if number not in set(TokenType) or len(score) != 4:
                raise CheckpointError(f"{file} is damaged: piece {len(pieces)} is of an unknown kind")
            kind = TokenType(number)
            pieces[len(pieces)] = (message.text(inner[1]) if 1 in inner else "", kind, struct.unpack("<f", score)[0])
        elif field.number == 2:
            trainer = {part.number: part for part in message.inner(field).fields()}
        elif field.number == 3:
            normalizer = {part.number: part for part in message.inner(field).fields()}
    kind_of_model = trainer[3].value if 3 in trainer else 1
    if not pieces or kind_of_model not in (1, 2):
        raise CheckpointError(f"{file} is no SentencePiece model of the kinds unigram and BPE")

    def flag(fields: Mapping[int, Field], number: int, default: bool) -> bool:
        return bool(fields[number].value) if number in fields else default

    return _ModelFile(
        pieces,
        unigram=kind_of_model == 1,
        charsmap=message.raw(normalizer[2]) if 2 in normalizer else b"",
        prefix=flag(normalizer, 3, True),
        merged=flag(normalizer, 4, True),
    )
