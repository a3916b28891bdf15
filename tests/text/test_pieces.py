"""A long text that is tokenized piece by piece has the tokens of the whole."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from acip_export.text import pieces as pieces_module
from acip_export.text.pieces import pieces
from tests.encoders import _word_pieces
from tests.gguf.tokenizers import (
    BYTE_LEVEL,
    STYLES,
    TEXTS,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    special_texts,
    unigram_tokenizer,
)

# What patterns, normalizers and added tokens take together, beside plain words.
FRAGMENTS = (
    *TEXTS, "word", " word", "Word ", "CamelCase", "don't", "DON'T ", "'re", "we 'll", "e\u0301", "e \u0301a", "\u00e9",
    " ", "  ", "\t", "\n", "\r\n", " \n ", "\n\n", "1", " 22", "3a", "a4 b", ".", " .", ").\n", "/", "\u00a0", "\u2028",
    "\u65e5\u672c", " \ud55c\uad6d\uc5b4", "\U0001f600", "<tool>", " <tool> a", "a b c d e f",
)  # fmt: skip


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def texts(tokenizer: Any, count: int = 60) -> list[str]:
    drawn = random.Random(0)
    fragments = [*FRAGMENTS, *special_texts(tokenizer)]
    return ["".join(drawn.choices(fragments, k=20)) for _ in range(count)]


def composing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    changed = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    changed.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=changed, eos_token="<|endoftext|>")


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "composing"])
def test_pieces_have_the_tokens_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_PIECE", 8)
    tokenizer = composing(byte_level_tokenizer("qwen2")) if name == "composing" else byte_level_tokenizer(name)
    count = 0
    for text in texts(tokenizer):
        cut = list(pieces(tokenizer, text))
        count += len(cut)
        assert "".join(cut) == text
        assert [token for piece in cut for token in ids(tokenizer, piece)] == ids(tokenizer, text), cut
    assert count > 200


@pytest.mark.parametrize("kind", [*STYLES, "unigram", "word pieces"])
def test_other_kinds_leave_a_text_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_PIECE", 8)
    if kind == "word pieces":
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_word_pieces())
    else:
        tokenizer = unigram_tokenizer() if kind == "unigram" else sentencepiece_tokenizer(kind)
    for text in TEXTS:
        assert list(pieces(tokenizer, text)) == [text]


def changed(**steps: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one step of another kind."""
    tokenizer = Tokenizer.from_str(byte_level_tokenizer("gpt-2").backend_tokenizer.to_str())
    for name, step in steps.items():
        tokenizer.add_tokens([step]) if name == "token" else setattr(tokenizer, name, step)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "steps",
    [
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.Prepend("x")},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {"pre_tokenizer": None},
        {"pre_tokenizer": pre_tokenizers.Sequence([])},
        {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"), pre_tokenizers.ByteLevel(False)]
            )
        },
        {"token": AddedToken("many words")},
        {"token": AddedToken("word", rstrip=True)},
        {"model": models.BPE({"a": 0}, [], dropout=0.1)},
    ],
    ids=[
        "lowercase",
        "prefix",
        "blank",
        "no-split",
        "none",
        "empty",
        "pattern",
        "blank-in-token",
        "swallows",
        "dropout",
    ],
)
def test_a_step_that_is_not_known_leaves_a_text_whole(steps: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_PIECE", 8)
    text = "many words and many words behind them, word after word"
    assert len(list(pieces(changed(), text))) > 1
    assert list(pieces(changed(**steps), text)) == [text]


def test_a_piece_is_no_longer_than_it_must_be() -> None:
    text = "some words, and a line break behind them\n" * 20_000
    cut = list(pieces(byte_level_tokenizer("llama-bpe"), text))
    assert max(map(len, cut)) <= 2 * pieces_module._PIECE
    assert "".join(cut) == text
