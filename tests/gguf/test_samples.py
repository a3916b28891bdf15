"""The samples for applications: Node as written, against llama.cpp's own tokens; Ollama's Modelfile."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from acip_export.api import convert_bundle
from acip_export.artifacts.plan import load_plan
from acip_export.errors import UnsupportedError
from acip_export.io.atomic import user_cache
from acip_export.model.checkpoint import Checkpoint
from converters.gguf import converter
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from tests.gguf.conftest import Rule
from tests.gguf.modelfile import parameters, parse
from tests.support import CHATML, dense, everywhere, make_bundle, make_plan, make_scores

ROOT = Path(__file__).parent.parent.parent
CONSUMER = user_cache() / "consumers" / "llama"
PROMPT, TOKENS = "def main(", 24
PAIR = {"rank": 96, "up_type": "f16", "down_type": "f16", "embedding_type": "q8_0"}
RULES: dict[str, Rule] = {
    "stock": dense(type="q8_0"),
    "lora": everywhere(representation="lora", type="q1_0", **PAIR),
    "factored": everywhere(representation="factored", **PAIR),
}
# A model in several files is one more export.
PARTS = "stock, in parts"
CHATS = "stock, with a template"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained sample: random models repeat one token, and agreeing on that would be an accident."""
    place = tmp_path_factory.mktemp("samples")
    model = Path(shutil.copytree(ROOT / "samples" / "llama", place / "llama"))
    found, scores = {}, make_scores(model)
    for name, (layout, options) in {
        **{layout: (layout, {}) for layout in RULES},
        PARTS: ("stock", {"split_max_size": "1500000"}),
        CHATS: ("stock", {}),
    }.items():
        if name == CHATS:
            (model / "chat_template.jinja").write_text(CHATML)
        plan = dataclasses.replace(make_plan(model, "gguf", layout, RULES[layout], context=128), options=options)
        checkpoint = Checkpoint.open(model).with_options(options)
        files = converter.predict_files(checkpoint, layout, plan.tensors, plan.serving)
        plan = dataclasses.replace(plan, files=files, planned_bytes=sum(files.values()))
        bundle = make_bundle(model, plan, place / name / "bundle", scores)
        found[name] = place / name / "my export"
        convert_bundle(bundle.path, found[name])
    assert len(load_plan(found[PARTS] / "plan.json").files) > 2
    return found


def generate(export: Path, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    node = shutil.which("node")
    if node is None or not (CONSUMER / "node_modules").is_dir():
        pytest.skip("node-llama-cpp is not installed; with Node on the path run  make consumers")
    shutil.copy(ROOT / "samples" / "node" / "generate.js", place)
    shutil.copy(ROOT / "samples" / "node" / "package.json", place)
    (place / "node_modules").symlink_to(CONSUMER / "node_modules")
    command = [node, "generate.js", str(export), PROMPT, str(TOKENS), *words]
    # Threads wait for each other busily: on a machine that does other things as well, two are far slower than one.
    environment = {**os.environ, "THREADS": "1"}
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.mark.parametrize("layout", ["stock", "lora", PARTS])
def test_node_chooses_the_tokens_of_llama_cpp(layout: str, exports: dict[str, Path], tmp_path: Path) -> None:
    done = generate(exports[layout], tmp_path, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    with LlamaCppSession(exports[layout], load_plan(exports[layout] / "plan.json").serving, threads=1) as session:
        assert answer["input"] == AutoTokenizer.from_pretrained(ROOT / "samples/llama")(PROMPT)["input_ids"]
        assert answer["output"] == session.greedy(answer["input"], TOKENS)
    assert len(set(answer["output"])) > 4


def test_node_answers_where_there_is_a_template(exports: dict[str, Path], tmp_path: Path) -> None:
    done = generate(exports[CHATS], tmp_path, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    with LlamaCppSession(exports[CHATS], load_plan(exports[CHATS] / "plan.json").serving, threads=1) as session:
        held, said = answer["input"], answer["output"]
        asked = session.tokenize(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")
        place = next(i for i in range(len(held)) if held[i : i + len(asked)] == asked) + len(asked)
        assert said and session.greedy(held[:place], len(said)) == said


def test_node_says_that_it_does_not_run_pairs(exports: dict[str, Path], tmp_path: Path) -> None:
    done = generate(exports["factored"], tmp_path)
    assert done.returncode == 2
    assert "node-llama-cpp runs gguf, stock or lora" in done.stderr


def modelfile(export: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "samples" / "ollama" / "modelfile.py"), str(export)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_modelfile_names_files_and_settings(exports: dict[str, Path]) -> None:
    lines = modelfile(exports["stock"]).stdout.splitlines()
    assert lines == [
        "# The server needs  OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE=f16 LLAMA_ARG_CACHE_RAM=0",
        f"FROM {exports['stock'] / 'model.gguf'}",
        "PARAMETER num_ctx 128",
        "PARAMETER num_batch 32",
        "PARAMETER num_gpu 0",
    ]
    assert f"ADAPTER {exports['lora'] / 'adapter.gguf'}" in modelfile(exports["lora"]).stdout.splitlines()
    parts = [Path(value) for name, value in parse(modelfile(exports[PARTS]).stdout) if name == "from"]
    assert parts == sorted(exports[PARTS].glob("model-*.gguf"))
    assert parameters(modelfile(exports[PARTS]).stdout) == {"num_ctx": 128, "num_batch": 32, "num_gpu": 0}
    refused = modelfile(exports["factored"])
    assert refused.returncode == UnsupportedError.exit_code
    assert "Ollama runs gguf, stock or lora" in refused.stderr
