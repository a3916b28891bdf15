"""What the files of a tokenizer must be like, and what transformers makes of them where two of them disagree."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from acip_export.errors import CheckpointError, InputError
from acip_export.model.chat_template import ChatTemplate, find_chat_template
from acip_export.model.split_patterns import TEKKEN

logger = logging.getLogger(__name__)

# The class of a tokenizer that is rebuilt from its vocabulary and the settings of tokenizer_config.json.
_BERT = ("BertTokenizer", "BertTokenizerFast")
# BERT's normalizer: key in tokenizer_config.json -> key in tokenizer.json, and what stands for a missing one.
_BERT_SETTINGS: Mapping[str, tuple[str, bool | None]] = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
# transformers puts Tekken's pattern in place of another one where tokenizer_config.json asks for it, in models of these
# kinds that an older release has saved, with vocabularies of more than so many tokens.
_MENDED_KINDS = ("mistral", "mistral3", "ministral", "pixtral", "voxtral")
_MENDED_BELOW, _MENDED_ABOVE = 5, 100_000
# Tokens that a sentence names.
_NAMED = 5
_QUESTION = ({"role": "user", "content": "Hello"},)


def check_tokenizer(file: Path, tokenizer: Mapping[str, Any]) -> None:
    """Check the tokens of a ``tokenizer.json``.

    Raises:
        CheckpointError: added tokens that are none, or one whose number another piece of the vocabulary has: libraries
            disagree then about which of the two it is.
    """
    model = tokenizer.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{file} is no tokenizer: it has no object  model")
    added = tokenizer.get("added_tokens") or ()
    if not isinstance(added, (tuple, list)):
        raise CheckpointError(f"{file}: $.added_tokens is a {type(added).__name__}, expected a list of tokens")
    for index, token in enumerate(added):
        for key, kind in (("content", str), ("id", int)):
            if not isinstance(token, Mapping) or type(token.get(key)) is not kind:
                raise CheckpointError(f"{file}: $.added_tokens[{index}] has no {key}, or one of another type")
    pieces = {} if not added else _pieces(model)
    for token in added:
        piece = pieces.get(token["id"])
        if piece is not None and piece != token["content"]:
            raise CheckpointError(
                f"{file}: token {token['id']} is {piece!r} in the vocabulary and {token['content']!r} among "
                "added_tokens, so that every library reads it otherwise; give one of them another number"
            )


def _pieces(model: Mapping[str, Any]) -> dict[int, str]:
    """Pieces by number; of an unknown kind of vocabulary none."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, Mapping):
        return {number: piece for piece, number in vocabulary.items() if isinstance(number, int)}
    if isinstance(vocabulary, (tuple, list)):  # unigram: [piece, score]
        rows = enumerate(vocabulary)
        return {number: row[0] for number, row in rows if isinstance(row, (tuple, list)) and row}
    return {}


def check_template(model: Path) -> None:
    """Warn of a chat template that cannot be used: the model is exported without its conversations.

    Raises:
        CheckpointError: as :func:`acip_export.model.chat_template.find_chat_template`.
    """
    template = find_chat_template(model)
    if template is not None:
        try:
            ChatTemplate(template).render(_QUESTION)
        except InputError as reason:
            logger.warning("%s: %s; the model can be exported, but not be talked to", model, reason)


def lost_normalizer(tokenizer: Mapping[str, Any]) -> str | None:
    """Return the kind of normalizer that a byte-level BPE has and runtimes leave out; text in the wild is NFC."""
    steps = tokenizer.get("pre_tokenizer") or {}
    byte_level = (steps.get("pretokenizers") or (steps,))[-1].get("type") == "ByteLevel"
    kind = (tokenizer.get("normalizer") or {}).get("type")
    return kind if byte_level and kind not in (None, "NFC") else None


def resolved_normalizer(tokenizer: Mapping[str, Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``tokenizer.json`` with the normalizer that transformers computes with.

    transformers makes a BERT tokenizer anew from its vocabulary and ``tokenizer_config.json``; other programs read
    ``tokenizer.json`` alone.

    Args:
        options: ``tokenizer_config.json``.
    """
    normalizer = tokenizer.get("normalizer")
    if not isinstance(normalizer, Mapping) or normalizer.get("type") != "BertNormalizer":
        return tokenizer
    if options.get("tokenizer_class") not in _BERT:
        return tokenizer
    settings = {key: options.get(option, default) for option, (key, default) in _BERT_SETTINGS.items()}
    if settings == {key: normalizer.get(key) for key in settings}:
        return tokenizer
    return {**tokenizer, "normalizer": {**normalizer, **settings}}


def begins_texts(tokenizer: Mapping[str, Any]) -> bool:
    """Tell whether a token is put before every text; ``add_bos_token`` beside ``tokenizer.json`` changes nothing."""
    steps = tokenizer.get("post_processor") or {}
    for step in steps.get("processors") or (steps,):
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            return True
        if "SpecialToken" in next(iter(step.get("single") or ()), {}):
            return True
    return False


def mended_by_transformers(tokenizer: Mapping[str, Any], options: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Tell whether transformers splits text at another pattern than ``tokenizer.json`` says; runtimes do not.

    Args:
        options: ``tokenizer_config.json``.
        config: ``config.json``.
    """
    saved_by = str(config.get("transformers_version") or "0").partition(".")[0]
    pre = tokenizer.get("pre_tokenizer")
    if (
        not options.get("fix_mistral_regex")
        or config.get("model_type") not in _MENDED_KINDS
        or (saved_by.isdecimal() and int(saved_by) >= _MENDED_BELOW)
        or pre is None
    ):
        return False
    added = tokenizer.get("added_tokens") or ()
    pieces = {*tokenizer["model"].get("vocab", ()), *(token["content"] for token in added)}
    first: Mapping[str, Any] = (pre.get("pretokenizers") or ({},))[0]
    return len(pieces) > _MENDED_ABOVE and (first.get("pattern") or {}).get("Regex") != TEKKEN


def tokens_with(tokenizer: Mapping[str, Any], flags: Collection[str]) -> dict[str, list[str]]:
    """Added tokens that are matched in a way that not every runtime knows: their texts by the flag that says so.

    Args:
        flags: of ``single_word``, ``lstrip``, ``rstrip``, ``normalized``; the last matters with a normalizer, and
            not with NFC.
    """
    changes = (tokenizer.get("normalizer") or {}).get("type", "NFC") != "NFC"
    wanted = [flag for flag in flags if flag != "normalized" or changes]
    added = tokenizer.get("added_tokens") or ()
    found = {flag: [token["content"] for token in added if token.get(flag) is True] for flag in wanted}
    return {flag: texts for flag, texts in found.items() if texts}


def flags_sentence(runtime: str, found: Mapping[str, list[str]]) -> str:
    """What a user has to know about the tokens of :func:`tokens_with`."""
    named = "; ".join(
        f"{flag}: {', '.join(map(repr, texts[:_NAMED]))}{' …' * (len(texts) > _NAMED)}" for flag, texts in found.items()
    )
    return f"{runtime} finds some added tokens of the tokenizer elsewhere, or leaves blanks beside them ({named})"
