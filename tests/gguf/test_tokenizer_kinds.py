"""llama.cpp tokenizes as the model does, for every kind of tokenizer, on code, many scripts, emoji and blanks."""

from __future__ import annotations

import copy
import json
import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from acip_export.errors import CheckpointError, UnsupportedError
from converters.gguf import converter
from converters.gguf.tokenizer import strips_after_special, tokenizer_metadata
from converters.gguf.tokenizer.bpe import APPROXIMATE, PRE_TOKENIZERS
from converters.gguf.tokenizer.common import ENDS_BY_NAME
from tests.gguf import tokenizers
from tests.gguf.tokenizers import BYTE_LEVEL, TEXTS, VOCABULARY, Vocabulary, special_texts
from tests.support import make_model

# More embeddings than tokens, as most models have.
ROWS = VOCABULARY + 28


def saved(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Any:
    tokenizer.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def assert_equal(reference: Any, vocabulary: Vocabulary, texts: list[str]) -> None:
    for text in texts:
        assert vocabulary.tokenize(text) == reference(text, add_special_tokens=False)["input_ids"], text
        assert vocabulary.tokenize(text, wrap=True) == reference(text)["input_ids"], text


@pytest.mark.parametrize("style", ["llama2", "gemma", "phi3"])
def test_sentencepiece_bpe(style: str, tmp_path: Path) -> None:
    reference = saved(tokenizers.sentencepiece_tokenizer(style), tmp_path)
    metadata = tokenizer_metadata(tmp_path, {}, ROWS)
    name = converter._general_name("a model", tmp_path)
    assert ("Phi-3" in name) == (style == "phi3")
    vocabulary = Vocabulary(metadata, tmp_path / "v.gguf", name)
    assert_equal(reference, vocabulary, [*TEXTS, *special_texts(reference)])


def test_metaspace_differs_at_blanks_and_after_special_tokens_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Mistral's newer files. The difference is llama.cpp's, for every converter; it is said, not hidden."""
    reference = saved(tokenizers.sentencepiece_tokenizer("mistral"), tmp_path)
    with caplog.at_level(logging.WARNING):
        vocabulary = Vocabulary(tokenizer_metadata(tmp_path, {}, ROWS), tmp_path / "v.gguf")
    assert "starts with a blank or follows a special token" in caplog.text
    added = ("<", "\n\n")  # tokens of their own in this vocabulary, the first by its special tokens
    assert_equal(reference, vocabulary, [t for t in TEXTS if not t.startswith(" ") and not any(a in t for a in added)])
    assert vocabulary.tokenize("</s>a") != reference("</s>a", add_special_tokens=False)["input_ids"]


def test_unigram(tmp_path: Path) -> None:
    reference = saved(tokenizers.unigram_tokenizer(), tmp_path)
    assert_equal(reference, Vocabulary(tokenizer_metadata(tmp_path, {}, ROWS), tmp_path / "v.gguf"), list(TEXTS))


@pytest.mark.parametrize(("kind", "gemma"), [("bpe", False), ("bpe", True), ("unigram", False)])
def test_model_file_without_tokenizer_json(kind: str, gemma: bool, tmp_path: Path) -> None:
    model = tokenizers.sentencepiece_model(kind, gemma)
    reference = tokenizers.processor(model)
    (tmp_path / "tokenizer.model").write_bytes(model)
    added = {
        str(VOCABULARY): {"content": "<tool>", "special": False},
        str(VOCABULARY + 1): {"content": "<|e|>", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "bos_token": "<s>"}))
    vocabulary = Vocabulary(tokenizer_metadata(tmp_path, {}, ROWS), tmp_path / "v.gguf")
    for text in TEXTS[:-1]:
        assert vocabulary.tokenize(text) == reference.Encode(text), text
        assert vocabulary.tokenize(text, wrap=True) == [reference.bos_id(), *reference.Encode(text)]
    assert vocabulary.tokenize("<tool><|e|>") == [VOCABULARY, VOCABULARY + 1]


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_bpe(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reference = saved(tokenizers.byte_level_tokenizer(name), tmp_path)
    metadata = tokenizer_metadata(tmp_path, {}, ROWS)
    texts = [*TEXTS, *special_texts(reference)]
    if name in APPROXIMATE:
        assert "combining marks" in caplog.text
        texts = [text for text in texts if not any(unicodedata.category(c).startswith("M") for c in text)]
        assert len(texts) > 6
    assert_equal(reference, Vocabulary(metadata, tmp_path / "v.gguf"), texts)


def test_every_pattern_but_one_has_a_trained_tokenizer() -> None:
    assert set(PRE_TOKENIZERS) - set(BYTE_LEVEL) == {"qwen35"}


def test_override_of_the_pre_tokenizer(tmp_path: Path) -> None:
    saved(tokenizers.byte_level_tokenizer("gpt-2"), tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation", "behavior": "Isolated"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedError, match="has no counterpart"):
        tokenizer_metadata(tmp_path, {}, ROWS)
    Vocabulary(tokenizer_metadata(tmp_path, {}, ROWS, "falcon"), tmp_path / "v.gguf")


def test_override_is_for_byte_level_bpe(tmp_path: Path) -> None:
    saved(tokenizers.sentencepiece_tokenizer("llama2"), tmp_path)
    with pytest.raises(UnsupportedError, match="--pre-tokenizer is for byte-level BPE"):
        tokenizer_metadata(tmp_path, {}, ROWS, "llama-bpe")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["model"]["merges"].__delitem__(slice(100, None)), r"has 100 merges, but .* \d+ ways"),
        (lambda d: d["model"]["vocab"].pop("<0x41>"), "255 of the 256 byte pieces"),
        (lambda d: d["model"].update(byte_fallback=False), "a BPE that llama.cpp does not have"),
        (lambda d: d.update(normalizer={"type": "NFKC"}), "normalizes its input"),
        (lambda d: d.update(normalizer=None, pre_tokenizer=None), "keeps blanks as they are"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "no counterpart"),
        (lambda d: d.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}),
         "splits text at blanks"),
        (lambda d: d["model"]["vocab"].update(more=ROWS), f"has token {ROWS}, but the model has {ROWS} embeddings"),
    ],
)  # fmt: skip
def test_refused_sentencepiece(edit: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    saved(tokenizers.sentencepiece_tokenizer("gemma"), tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    edit(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedError, match=message):
        tokenizer_metadata(tmp_path, {}, ROWS)


def test_damaged_model_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizers.sentencepiece_model("bpe")[:1000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is damaged"):
        tokenizer_metadata(tmp_path, {}, ROWS)


def test_name_that_says_phi3_without_its_tokens(tmp_path: Path) -> None:
    """llama.cpp does not load a model called Phi-3 whose vocabulary has no </s>."""
    model = make_model(tmp_path / "Phi-3-mini", "phi3", num_hidden_layers=1)
    assert not strips_after_special(model)
    assert converter._general_name("Phi-3-mini", model) == "Phi 3-mini"
    metadata = tokenizer_metadata(model, {}, ROWS)
    Vocabulary(metadata, tmp_path / "v.gguf", converter._general_name("Phi-3-mini", model))
    with pytest.raises(AssertionError, match="error loading model vocabulary"):
        Vocabulary(metadata, tmp_path / "w.gguf", "Phi-3-mini")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_answers_end_where_the_model_ends_them(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The ends of three files; those of unknown names need keys of their own, of which there are two."""
    made = {
        "bytes": lambda: tokenizers.byte_level_tokenizer("qwen2"),
        "sentencepiece": lambda: tokenizers.sentencepiece_tokenizer("llama2"),
    }
    tokenizer = copy.deepcopy(made[kind]())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>", "<halt>", "<more>"]})
    saved(tokenizer, tmp_path)
    stop, halt, more = (tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("stop", "halt", "more"))
    own = tokenizer.eos_token_id
    tokenizer_metadata(tmp_path, {}, ROWS)  # kept, and read again when the file appears
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [own, stop]}))
    vocabulary = Vocabulary(tokenizer_metadata(tmp_path, {"eos_token_id": halt}, ROWS), tmp_path / "v.gguf")
    assert [vocabulary.ends(token) for token in (own, stop, halt, more)] == [True, True, True, False]
    assert "it will not stop" not in caplog.text
    tokenizer_metadata(tmp_path, {"eos_token_id": [halt, more]}, ROWS)
    assert "it will not stop at '<more>'" in caplog.text


def test_llama_cpp_knows_these_ends_by_name(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizers.byte_level_tokenizer("qwen2"))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(ENDS_BY_NAME)})
    saved(tokenizer, tmp_path)
    vocabulary = Vocabulary(tokenizer_metadata(tmp_path, {}, ROWS), tmp_path / "v.gguf")
    assert [name for name in ENDS_BY_NAME if not vocabulary.ends(tokenizer.convert_tokens_to_ids(name))] == []
