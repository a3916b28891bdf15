"""tokenizer.json to GGUF keys: recognised patterns, special tokens, padding; llama.cpp tokenizes as the model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer

from acip_export.artifacts.plan import Serving
from acip_export.errors import CheckpointError, UnsupportedError
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from converters.gguf.tokenizer import tokenizer_metadata
from converters.gguf.writer import GgufWriter, string
from tests.gguf.conftest import ARCHITECTURES, export
from tests.support import CORPUS, SPLITS, dense, make_tokenizer

TEXTS = (
    *CORPUS,
    "<|begin_of_text|>special<|im_start|> tokens<|end_of_text|>",
    "x = {'a': [1, 22, 333, 4444]}\r\n\r\n\tif x is not None:\n\t\t  return  0x1F  # ünïcødé\n\n",
    "I'LL we'Re 'S DON'T 'd\u00a0nbsp \u2028 line 한국어 ไทย עברית 𝒳 ½ ² Ⅳ ١٢٣",
    "   leading,   trailing   ",
    "\n \n  \n   \n",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("llama-bpe").save_pretrained(directory)
    return directory


def edited(saved: Path, directory: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the tokenizer with ``edit`` applied to its tokenizer.json."""
    data = json.loads((saved / "tokenizer.json").read_text())
    edit(data)
    (directory / "tokenizer.json").write_text(json.dumps(data))
    (directory / "tokenizer_config.json").write_bytes((saved / "tokenizer_config.json").read_bytes())
    return directory


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("steps", "whole_words", "expected"),
    [
        ([split(SPLITS["llama-bpe"]), BYTES], True, "llama-bpe"),
        ([split(SPLITS["llama-bpe"]), BYTES], False, "dbrx"),
        ([split(SPLITS["qwen2"]), BYTES], False, "qwen2"),
        ([GPT2], False, "gpt-2"),
        ([DIGITS, GPT2], False, "smollm"),
    ],
)
def test_pre_tokenizer_is_recognised(
    saved: Path, tmp_path: Path, steps: list[Any], whole_words: bool, expected: str
) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
        data["model"]["ignore_merges"] = whole_words

    assert tokenizer_metadata(edited(saved, tmp_path, edit), {}, 512)["tokenizer.ggml.pre"] == string(expected)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+|\p{N}{1,2}"),
         UnsupportedError, r"no pre-tokenizer for the pattern .* the closest is"),
        (lambda d: d["pre_tokenizer"].update(pretokenizers=[{**GPT2, "add_prefix_space": True}]),
         UnsupportedError, "no counterpart"),
        (lambda d: d["model"].update(byte_fallback=True), UnsupportedError, "no SentencePiece model"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), UnsupportedError, "normalizes its input"),
        (lambda d: d.update(post_processor={"type": "RobertaProcessing"}), UnsupportedError, "post-processor"),
        (lambda d: d["model"]["vocab"].update(too_many=512), UnsupportedError, "has token 512"),
        (lambda d: d.pop("model"), CheckpointError, "damaged"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_do_differently_is_refused(
    saved: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tokenizer_metadata(edited(saved, tmp_path, edit), {}, 512)


def test_missing_and_damaged_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        tokenizer_metadata(tmp_path, {}, 512)
    (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        tokenizer_metadata(tmp_path, {}, 512)


def test_changed_file_is_read_again(saved: Path, tmp_path: Path) -> None:
    before = tokenizer_metadata(edited(saved, tmp_path, lambda _: None), {}, 512)
    after = tokenizer_metadata(edited(saved, tmp_path, lambda d: d.update(post_processor=None)), {}, 512)
    assert before["tokenizer.ggml.add_bos_token"] != after["tokenizer.ggml.add_bos_token"]


def test_keys_as_gguf_py_reads_them(saved: Path, tmp_path: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        data["added_tokens"].append({"id": 512, "content": "<tool>", "special": False, **plain})

    directory = edited(saved, tmp_path, edit)
    options = json.loads((directory / "tokenizer_config.json").read_text())
    options["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ yes }}"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(options))
    head = {"general.architecture": string("llama")}
    with GgufWriter(tmp_path / "t.gguf", {**head, **tokenizer_metadata(directory, {}, 515)}, []):
        pass
    fields = gguf.GGUFReader(tmp_path / "t.gguf").fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    assert value("ggml.model") == "gpt2"
    assert value("ggml.tokens")[510:] == [*value("ggml.tokens")[510:512], "<tool>", "[PAD513]", "[PAD514]"]
    assert value("ggml.token_type")[:2] == [3, 3]
    assert value("ggml.token_type")[511:] == [1, 4, 5, 5]
    assert (value("ggml.bos_token_id"), value("ggml.eos_token_id"), value("ggml.padding_token_id")) == (0, 1, 0)
    assert (value("ggml.add_bos_token"), value("ggml.add_eos_token")) == (True, False)
    assert value("chat_template") == "{{ yes }}"
    assert all(merge.count(" ") == 1 for merge in value("ggml.merges"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_llama_cpp_tokenizes_as_the_model_does(arch: str, models: dict[str, Path], tmp_path: Path) -> None:
    _, out = export(models[arch], "stock", dense(type="q8_0"), tmp_path)
    reference = AutoTokenizer.from_pretrained(models[arch])
    with LlamaCppSession(out, Serving(64, "f16", 32), threads=1) as session:
        for text in TEXTS:
            assert session.tokenize(text) == reference(text, add_special_tokens=False)["input_ids"], text
