"""Encoders in llama.cpp: vectors of the bundle, tokens of the tokenizer, bytes of the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from acip_export import api as pipeline
from acip_export.artifacts.bundle import load_bundle
from acip_export.artifacts.plan import Serving
from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import pooled
from acip_export.planning import PlanRequest
from acip_export.ranking import rank_model
from converters.gguf import converter
from converters.gguf.format import GGUF
from converters.gguf.runtimes.llama_encoder import LlamaEncoderSession
from tests.encoders import CALIBRATION, lines_of_text, make_encoder
from tests.support import CORPUS, dense, make_bundle, make_plan

TEXTS = ("The quick brown fox doesn't jump.", "def main", "emoji: and runs of   blanks 1,234.56")


ALL_FLOAT = dense(type="f32")
RUNTIME = Serving(48, "f16", 48)


def export(model: Path, out: Path, words: str, linear: str) -> tuple[Path, Path]:
    layers = set(Checkpoint.open(model).linear_modules)

    def decide(name: str, _shape: tuple[int, ...]) -> dict[str, Any]:
        form = linear if name.removesuffix(".weight") in layers else words if "word_embeddings" in name else "f32"
        return {"representation": "dense", "type": form}

    plan = make_plan(model, "gguf", "stock", decide, context=48, prompt_batch=48)
    bundle = make_bundle(model, plan, out / "bundle")
    (out / "export").mkdir()
    converter.convert(bundle, out / "export", lambda _: None)
    predicted = converter.predict_files(Checkpoint.open(model), "stock", plan.tensors, plan.serving)
    assert predicted == {f.name: f.stat().st_size for f in (out / "export").iterdir()}
    return bundle.path, out / "export"


def reference(bundle: Path, ids: list[list[int]]) -> np.ndarray:
    model = load_bundle(bundle, converter.round_trip)
    encoder = Checkpoint.open(bundle).encoder
    assert encoder is not None
    rows = []
    with torch.no_grad():
        for tokens in ids:
            output = model(input_ids=torch.tensor([tokens]))
            if encoder.pooling is None:
                rows.append(output.logits[0])
            else:
                rows.append(pooled(output.last_hidden_state, torch.ones(1, len(tokens)).bool(), encoder.pooling)[0])
    return torch.stack(rows).numpy()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize(
    ("pooling", "words", "linear"), [("mean", "f32", "f32"), ("cls", "f32", "f32"), ("mean", "q8_0", "q4_0")]
)
def test_embeddings(tmp_path: Path, pooling: str, words: str, linear: str) -> None:
    model = make_encoder(tmp_path / "bert", pooling=pooling)
    bundle, directory = export(model, tmp_path, words, linear)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    with LlamaEncoderSession(directory, RUNTIME, threads=1) as session:
        found = session.outputs(ids)
        buffers = session.buffers
    # llama.cpp's GELU is the tanh form from a table of float16, and q4_0 products round the activations to q8.
    assert cosines(found, reference(bundle, ids)).min() > (0.9999 if linear == "f32" else 0.999)
    assert buffers is not None and buffers.kv_cache == 0


def test_classification(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert", "classification")
    bundle, directory = export(model, tmp_path, "f32", "f32")
    ids = [AutoTokenizer.from_pretrained(model)(text)["input_ids"] for text in TEXTS]
    with LlamaEncoderSession(directory, RUNTIME, threads=1) as session:
        np.testing.assert_allclose(session.outputs(ids), reference(bundle, ids), atol=2e-2, rtol=0)  # GELU, as above


def test_tokens(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    _, directory = export(model, tmp_path, "f32", "f32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    # llama.cpp takes composed letters apart only as far as their base: Hangul and Devanagari lose what follows it.
    other = ("안녕하세요", "हिन्दी")
    corpus = "".join(CORPUS).replace(other[0], "").replace(other[1], "")
    lines = [line for line in corpus.splitlines() if line.strip()] + list(TEXTS)
    with LlamaEncoderSession(directory, RUNTIME, threads=1) as session:
        different = {line: (session.tokenize(line), tokenizer(line)["input_ids"]) for line in lines}
    assert not {line: pair for line, pair in different.items() if pair[0] != pair[1]}


@pytest.mark.parametrize(("hidden", "ffn", "tokens"), [(64, 96, 48), (128, 1024, 48), (256, 128, 40), (64, 64, 300)])
def test_memory(tmp_path: Path, hidden: int, ffn: int, tokens: int) -> None:
    model = make_encoder(tmp_path / "bert", hidden_size=hidden, intermediate_size=ffn, max_position_embeddings=400)
    _, directory = export(model, tmp_path, "f32", "f32")
    runtime = Serving(tokens, "f16", tokens)
    with LlamaEncoderSession(directory, runtime, threads=1) as session:
        session.outputs([[2] + [7] * (tokens - 2) + [3]])
        found = session.buffers
    expected = GGUF.memory.serving(Checkpoint.open(model).shape, runtime)
    assert found.kv_cache == expected.kv_cache == 0
    # llama.cpp logs hundredths of a MiB. An upper bound, and no more than half as much again.
    rounding = 0.005 * 2**20
    assert found.compute - rounding <= expected.compute <= 1.5 * found.compute + rounding
    # It logs room for one token, and makes more when it encodes: tests/verification/test_encoders.py measures that.
    assert found.output - rounding <= expected.output / tokens <= 1.5 * found.output + rounding


def test_ranked_planned_exported_and_verified(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    text = lines_of_text(tmp_path / "lines.txt")
    scores = rank_model(model, text, algorithm="kfac", calibration=CALIBRATION, out=model / "bert.acip")
    checkpoint = Checkpoint.open(model)
    plan = pipeline.plan_export(checkpoint, scores, PlanRequest("gguf", 120_000, budget_scope="file", context=40))
    windows = pipeline.evaluation_text(checkpoint.path, text, 40)
    report = pipeline.export_model(checkpoint, scores, plan, tmp_path / "export", text=windows)
    assert report is not None and report.passed and report.written_bytes == plan.planned_bytes <= 120_000
    assert report.similarity is not None and report.similarity_spearman is not None
    assert 0.9 < report.similarity < 1 and report.similarity_spearman > 0.9


def test_refused(tmp_path: Path) -> None:
    for name, kind, pooling, match in (
        ("mlm", "masked-lm", "mean", "no head over tokens"),
        ("max", "embedding", "max", "pools by mean or cls"),
    ):
        model = make_encoder(tmp_path / name, kind, pooling)
        plan = make_plan(model, "gguf", "stock", ALL_FLOAT)
        with pytest.raises(UnsupportedError, match=match):
            converter.predict_files(Checkpoint.open(model), "stock", plan.tensors, plan.serving)
    cased = make_encoder(tmp_path / "cased")
    file = cased / "tokenizer_config.json"  # which decides, as in transformers
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_lower_case": False}))
    plan = make_plan(cased, "gguf", "stock", ALL_FLOAT)
    with pytest.raises(UnsupportedError, match="lower-cases and strips accents"):
        converter.predict_files(Checkpoint.open(cased), "stock", plan.tensors, plan.serving)
    plain = make_encoder(tmp_path / "plain")
    plan = make_plan(plain, "gguf", "stock", ALL_FLOAT)
    with pytest.raises(UnsupportedError, match="--layout stock  only"):
        converter.predict_files(Checkpoint.open(plain), "lora", plan.tensors, plan.serving)
