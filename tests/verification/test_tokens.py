"""A runtime that cuts text into other tokens than transformers is found out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.report import Tokens
from acip_export.verification.export import verify_export
from acip_export.verification.process import measure_process
from acip_export.verification.tokens import NASTY, PLAIN, STRINGS, compare_tokens, plain_text_failures, token_notes
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from converters.onnx.runtimes.genai import GenaiSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.verification.conftest import MakeExport


def found(exported: MakeExport, target: str, tokenizer: Path) -> Tokens | None:
    made = exported(target)
    opened = LlamaCppSession if target == "gguf" else GenaiSession
    with opened(made.export, made.plan.serving) as session:
        return compare_tokens([session.tokenize(text) for text in STRINGS], tokenizer)


@pytest.fixture
def other_tokenizer(exported: MakeExport, tmp_path: Path) -> Path:
    """The model's tokenizer, with two letters' ids exchanged."""
    model = tmp_path / "model"
    shutil.copytree(exported("gguf").model, model)
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]
    file.write_text(json.dumps(tokenizer))
    return model


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_the_same_tokenizer_gives_the_same_tokens(exported: MakeExport, target: str) -> None:
    tokens = found(exported, target, exported(target).model)
    assert tokens is not None
    assert tokens.texts == len(PLAIN) + len(NASTY)
    assert plain_text_failures("runtime", tokens) == []
    assert not tokens.different, [each.text for each in tokens.different]


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_another_tokenizer_fails_on_plain_text(exported: MakeExport, target: str, other_tokenizer: Path) -> None:
    tokens = found(exported, target, other_tokenizer)
    (failure,) = plain_text_failures("runtime", tokens)
    assert failure.startswith(f"runtime: its tokens are not those of transformers, of {PLAIN[0]!r} [")


def test_a_normalizer_that_the_runtime_lacks_is_named(exported: MakeExport, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(exported("onnx").model, model)
    file = model / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "NFKC"}}))
    tokens = found(exported, "onnx", model)
    (note,) = token_notes("genai", tokens)
    assert note.startswith("genai cuts ")
    assert "ﬁn ½ ² Ⅳ" in note
    assert plain_text_failures("genai", tokens) == []


def test_a_runtime_without_a_tokenizer_is_not_compared(exported: MakeExport) -> None:
    made = exported("onnx")
    figures = measure_process(OnnxRuntimeSession.__module__, "OnnxRuntimeSession", made.export, texts=STRINGS)
    assert figures.tokens is None
    assert compare_tokens(figures.tokens, made.model) is None


def test_verification_fails_and_says_so(exported: MakeExport, other_tokenizer: Path, tmp_path: Path) -> None:
    made = exported("gguf")
    bundle = tmp_path / "bundle"
    shutil.copytree(made.bundle, bundle)
    shutil.copyfile(other_tokenizer / "tokenizer.json", bundle / "tokenizer.json")
    report = verify_export(made.export, Bundle.open(bundle))
    assert not report.passed
    assert any("its tokens are not those of transformers" in failure for failure in report.failures)
    (runtime,) = report.runtimes
    assert runtime.tokens is not None
    assert runtime.tokens.different[0].text == PLAIN[0]
