"""Exports opened by four programs, as applications do: the same tokens in all of them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from converters.onnx.runtimes.genai import GenaiSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.onnx.conftest import CONTEXT, Export, MakeExport
from tests.onnx.consumers import optimum_onnx, plain_onnxruntime, transformers_js
from tests.support import CORPUS

PROMPT = [int(token) for token in range(7, 40, 2)]
REQUEST = {"texts": list(CORPUS), "prompt": PROMPT, "count": CONTEXT - len(PROMPT)}
# Trained models: factor pairs of several types, and dense matrices in eight bits.
TRAINED = [("samples/llama", "mixed"), ("samples/qwen3", "int8")]
CONSUMERS = {
    "transformers.js": (transformers_js, "transformers.mjs"),
    "optimum-onnx": (optimum_onnx, "optimum_onnx.py"),
    "onnxruntime": (plain_onnxruntime, "plain_onnxruntime.py"),
}


def by_genai(export: Export) -> list[int]:
    with GenaiSession(export.path, export.bundle.plan.serving) as genai:
        return genai.greedy(PROMPT, REQUEST["count"])


def check(export: Export, answer: dict[str, Any], expected: list[int]) -> None:
    assert answer["tokens"] == expected
    tokenizer = AutoTokenizer.from_pretrained(export.model)
    assert answer["ids"] == [tokenizer(text)["input_ids"] for text in CORPUS]


@pytest.mark.parametrize("name", CONSUMERS)
def test_consumers_choose_the_tokens_of_genai(make_export: MakeExport, name: str) -> None:
    exports = [make_export(arch, True, rule) for arch, rule in TRAINED]
    consumer, script = CONSUMERS[name]
    answers = consumer(script, [export.path for export in exports], REQUEST)
    for export, answer in zip(exports, answers, strict=True):
        expected = by_genai(export)
        # A constant answer would agree with everything; random models give one, trained ones must not.
        assert len(set(expected)) > 1
        check(export, answer, expected)


@pytest.mark.parametrize(("arch", "rule"), TRAINED)
def test_a_cache_that_is_written_in_place_changes_no_token(make_export: MakeExport, arch: str, rule: str) -> None:
    export = make_export(arch, True, rule)
    with OnnxRuntimeSession(export.path, export.bundle.plan.serving) as session:
        assert session.greedy(PROMPT, REQUEST["count"]) == by_genai(export)


def test_more_families_in_transformers_js(make_export: MakeExport) -> None:
    exports = [make_export(arch, False, "mixed") for arch in ("gemma3_text", "phi3")]
    answers = transformers_js("transformers.mjs", [export.path for export in exports], REQUEST)
    for export, answer in zip(exports, answers, strict=True):
        check(export, answer, by_genai(export))
