"""Exports opened by transformers.js (in Node) and by optimum-onnx (in its own environment), as applications do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from acip_export.verify.genai import GenaiSession
from tests.onnx.conftest import CONTEXT, MakeExport
from tests.support import CORPUS

HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acip-export" / "consumers"
SCRIPTS = Path(__file__).parent.parent / "consumers"
PROMPT = [int(token) for token in range(7, 40, 2)]


def run(command: list[str | Path], request: dict[str, Any]) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def transformers_js(export: Path, request: dict[str, Any]) -> dict[str, Any]:
    node = shutil.which("node")
    if node is None or not (HOME / "node" / "node_modules").is_dir():
        pytest.skip("transformers.js is not installed; with Node on the path run  make consumers")
    return run([node, SCRIPTS / "transformers.mjs", HOME / "node", export], request)


def optimum_onnx(export: Path, request: dict[str, Any]) -> dict[str, Any]:
    python = HOME / "optimum" / "bin" / "python"
    if not python.exists():
        pytest.skip("optimum-onnx is not installed; run  make consumers")
    return run([python, SCRIPTS / "optimum_onnx.py", export], request)


CASES = [
    (transformers_js, "samples/llama", "mixed"),
    (transformers_js, "samples/llama", "int8"),
    (transformers_js, "samples/qwen3", "int8"),
    (transformers_js, "gemma3_text", "mixed"),
    (transformers_js, "phi3", "mixed"),
    (optimum_onnx, "samples/llama", "int4"),
    (optimum_onnx, "samples/qwen3", "int8"),
]


@pytest.mark.parametrize(("consumer", "arch", "rule"), CASES)
def test_consumers_choose_the_same_tokens(make_export: MakeExport, consumer: Any, arch: str, rule: str) -> None:
    export = make_export(arch, False, rule)
    count = CONTEXT - len(PROMPT)
    with GenaiSession(export.path, export.bundle.plan.runtime) as genai:
        expected = genai.greedy(PROMPT, count)
    answer = consumer(export.path, {"texts": list(CORPUS), "prompt": PROMPT, "count": count})
    assert answer["tokens"] == expected
    # A constant answer would agree with everything; random models give one, trained ones must not.
    assert len(set(expected)) > 1 or not arch.startswith("samples/")
    tokenizer = AutoTokenizer.from_pretrained(export.model)
    assert answer["ids"] == [tokenizer(text)["input_ids"] for text in CORPUS]
