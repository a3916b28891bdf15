"""A checkpoint that changed is noticed: by the hash of all of its numbers, and by its files' stamps during a run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from acip_export import api as pipeline
from acip_export.artifacts.scores import ScoreFile, load_scores, save_scores
from acip_export.errors import CheckpointError, ScoreFileError
from acip_export.formats.registry import export_format
from acip_export.model import weights_hash
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Progress
from acip_export.ranking import rank_model
from acip_export.ranking.config import DataConfig
from tests.ranking.support import calibration_text
from tests.support import dense, make_model, make_plan, make_scores

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "acip-export" / "weights"


def ranked(model: Path) -> ScoreFile:
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    assert scores.file is not None
    save_scores(
        replace(scores, model=replace(scores.model, weights_sha256=checkpoint.weights_sha256)), scores.file, True
    )
    return load_scores(scores.file)


def flip(model: Path, name: str = NAME) -> None:
    """Change the lowest bit of a number in the middle of a tensor."""
    info = Checkpoint.open(model).tensors[name]
    with (model / info.shard).open("r+b") as file:
        file.seek(info.offset + info.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_one_bit_where_the_fingerprint_does_not_look(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    scores, before = ranked(model), Checkpoint.open(model)
    plan = make_plan(model, "gguf", "stock", dense(type="q8_0"))
    flip(model)
    after = Checkpoint.open(model)
    assert after.fingerprint == before.fingerprint and after.weights_sha256 != scores.model.weights_sha256
    with pytest.raises(ScoreFileError, match="other weights than those that were ranked"):
        pipeline.materialize_bundle(after, scores, plan, tmp_path / "b")
    with pytest.raises(ScoreFileError, match="Rank this model:  acip-export rank"):
        pipeline.export_model(after, scores, plan, tmp_path / "e")
    assert not (tmp_path / "e").exists()
    # A score file that does not say is taken as it is.
    silent = replace(scores, model=replace(scores.model, weights_sha256=None))
    pipeline.materialize_bundle(after, silent, plan, tmp_path / "b")


def test_a_ranking_says_what_it_ranked(tmp_path: Path) -> None:
    model, text = make_model(tmp_path / "m"), calibration_text(tmp_path / "text.txt")
    few = DataConfig(context=32, batch=8, statistics_tokens=1024)
    rank_model(model, text, algorithm="magnitude", calibration=few, out=tmp_path / "s.acip")
    assert load_scores(tmp_path / "s.acip").model.weights_sha256 == Checkpoint.open(model).weights_sha256


def test_it_is_of_numbers_and_not_of_files(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", tie_word_embeddings=False)
    expected = Checkpoint.open(model).weights_sha256
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, model / file)
    index = {name: file for file, some in parts.items() for name in some}
    (model / "model.safetensors.index.json").write_text(str({"weight_map": index}).replace("'", '"'))
    assert Checkpoint.open(model).weights_sha256 == expected
    save_file({name: tensors[name].to(torch.bfloat16) for name in parts["b.safetensors"]}, model / "b.safetensors")
    assert Checkpoint.open(model).weights_sha256 != expected


def test_it_is_read_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "m")
    file = model / "model.safetensors"
    first = Checkpoint.open(model).weights_sha256
    assert not cache.exists()  # written a moment ago: it may be written again in the same tick
    monkeypatch.setattr(weights_hash, "_SETTLED_NS", -(10**18))
    assert Checkpoint.open(model).weights_sha256 == first
    (entry,) = cache.iterdir()
    with monkeypatch.context() as unread:
        unread.setattr(weights_hash, "_computed", lambda *_: pytest.fail("read again"))
        assert Checkpoint.open(model).weights_sha256 == first
    entry.write_bytes(b"\xff damaged")
    assert Checkpoint.open(model).weights_sha256 == first
    # Changed in place, with the old time put back.
    stat = file.stat()
    flip(model)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Checkpoint.open(model).weights_sha256 != first


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    checkpoint = Checkpoint.open(model)
    checkpoint.check_unchanged()
    checkpoint.read(NAME)
    flip(model)
    for reader in (checkpoint, checkpoint.with_options({"split": "1"})):
        with pytest.raises(CheckpointError, match="was changed or moved since it was opened"):
            reader.read(NAME)
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="was changed or moved since it was opened"):
        checkpoint.check_unchanged()


@pytest.mark.parametrize("verify", [True, False])
def test_an_export_of_a_changing_model_leaves_nothing(tmp_path: Path, verify: bool) -> None:
    """Changed when the last tensor has been read."""
    model = make_model(tmp_path / "m")
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    plan = make_plan(model, "gguf", "stock", dense(type="q8_0"))
    files = export_format("gguf").predict_files(checkpoint, "stock", plan.tensors, plan.serving)
    plan = replace(plan, files=files, planned_bytes=sum(files.values()), budget_scope="file")

    def change(progress: Progress) -> None:
        if progress.stage == "convert" and progress.done == progress.total:
            flip(model)

    with pytest.raises(CheckpointError, match="was changed or moved since it was opened"):
        pipeline.export_model(checkpoint, scores, plan, tmp_path / "out" / "e", verify=verify, progress=change)
    assert not list((tmp_path / "out").iterdir())
