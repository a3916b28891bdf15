"""Encoders: padded texts, losses by text, and the same score file as for causal models."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from acip_export.artifacts.scores import load_scores
from acip_export.errors import DataError, UnsupportedError, UsageError
from acip_export.io import kept_until_done
from acip_export.materialization.factors import basis_moments, factor_pair
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import Pooling
from acip_export.progress import Progress
from acip_export.ranking import AcipConfig, automatic_config, rank_model
from acip_export.ranking.data import read_data
from acip_export.ranking.load import load_model
from acip_export.ranking.statistics import collect_statistics
from acip_export.ranking.tasks import task_of
from tests.encoders import CALIBRATION, lines_of_text, make_encoder
from tests.ranking.support import context_of


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lines_of_text(tmp_path_factory.mktemp("text") / "lines.txt")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.mark.parametrize("algorithm", ["magnitude", "energy", "kfac", "fisher", "first-order"])
def test_training_free(encoder: Path, text: Path, tmp_path: Path, algorithm: str) -> None:
    scores = rank_model(encoder, text, algorithm=algorithm, calibration=CALIBRATION, out=tmp_path / "s.acip")
    loaded = load_scores(tmp_path / "s.acip")
    loaded.check_model(Checkpoint.open(encoder))
    assert loaded.loss_unit == "cosine distance per text" and loaded.curve == scores.curve
    # The product of the factors is the dense weight up to float32.
    assert scores.curve[0].loss < 1e-6 and scores.curve[0].spearman == pytest.approx(1, abs=1e-5)
    losses = [point.loss for point in scores.curve]
    assert losses[-1] > 0.005 and losses == sorted(losses)
    assert all(p.similarity_error is not None and -1 <= p.similarity_error <= 2 for p in scores.curve)
    assert list(scores.embedding_sensitivity) == ["embeddings.word_embeddings.weight"]
    assert "pooler.dense" not in scores.modules


def test_interrupted_ranking_goes_on(
    encoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured text by text is kept, too."""
    monkeypatch.setattr(kept_until_done, "_WORTH_KEEPING", 0.0)
    total = 0

    def count(progress: Progress) -> None:
        nonlocal total
        total = max(total, progress.done if progress.stage == "statistics" else 0)

    def stop(progress: Progress) -> None:
        if progress.stage == "statistics" and progress.done >= 0.9 * total:  # on the way back through the first block
            raise KeyboardInterrupt

    seen: list[Progress] = []
    whole, out = tmp_path / "whole.acip", tmp_path / "s.acip"
    rank_model(encoder, text, algorithm="fisher", calibration=CALIBRATION, out=whole, progress=count)
    with pytest.raises(KeyboardInterrupt):
        rank_model(encoder, text, algorithm="fisher", calibration=CALIBRATION, out=out, progress=stop)
    rank_model(encoder, text, algorithm="fisher", calibration=CALIBRATION, out=out, progress=seen.append)
    assert seen[0].stage == "statistics" and seen[0].done > 0.5 * total
    assert out.read_bytes() == whole.read_bytes()


def short_run(model: Path) -> AcipConfig:
    """The default for encoders, in a third of its steps and longer strides."""
    steps = 30
    config = automatic_config(Checkpoint.open(model))
    return replace(config, learning_rate=100 / steps * config.learning_rate, post_tune=60, batch=8)


@pytest.mark.slow
def test_learned_ranking_is_no_worse_than_where_it_starts(encoder: Path, text: Path) -> None:
    fisher = rank_model(encoder, text, algorithm="fisher", calibration=CALIBRATION)
    learned = rank_model(encoder, text, acip=short_run(encoder), calibration=CALIBRATION)
    assert learned.loss_unit == "cosine distance per text" and learned.algorithm["objective"] == "distill"
    for before, after in zip(fisher.curve, learned.curve, strict=True):
        assert after.loss_with_adapters is not None and after.spearman is not None
        best = min(after.loss, after.loss_with_adapters)
        # 1 % and 1e-5: what the order of a few equally harmless components decides.
        assert best <= 1.01 * before.loss + 1e-5
    # Adapters were trained, and pay where much is cut; a broken one gains nothing.
    by_ratio = {round(point.ratio, 1): point for point in learned.curve}
    assert by_ratio[0.4].loss_with_adapters < 0.95 * by_ratio[0.4].loss  # type: ignore[operator]


@pytest.mark.slow
def test_interrupted_run_resumes_to_the_same_bytes(encoder: Path, text: Path, tmp_path: Path) -> None:
    config = replace(short_run(encoder), post_tune=4, learning_rate=4e-3)
    whole, out = tmp_path / "whole.acip", tmp_path / "stopped.acip"
    rank_model(encoder, text, acip=config, calibration=CALIBRATION, out=whole)

    def stop(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("masks", 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        rank_model(encoder, text, acip=config, calibration=CALIBRATION, out=out, progress=stop)
    rank_model(encoder, text, acip=config, calibration=CALIBRATION, out=out, resume=True)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("kind", "unit"), [("masked-lm", "nats per masked token"), ("classification", "nats per text")]
)
@pytest.mark.parametrize("algorithm", ["fisher", "first-order"])
def test_other_kinds(text: Path, tmp_path: Path, kind: str, unit: str, algorithm: str) -> None:
    model = make_encoder(tmp_path / "bert", kind)
    scores = rank_model(model, text, algorithm=algorithm, calibration=CALIBRATION)
    assert scores.loss_unit == unit and scores.curve[0].spearman is None
    assert scores.curve[0].loss < 1e-6 < scores.curve[-1].loss
    assert all(module.sensitivity > 0 and module.drop_loss.sum() > 0 for module in scores.modules.values())


def test_predicted_loss_is_the_measured_one(encoder: Path, text: Path) -> None:
    """A component that is dropped alone costs what the Fisher information of its mask says, in the curve's unit."""
    checkpoint = Checkpoint.open(encoder)
    scores = rank_model(encoder, text, algorithm="fisher", calibration=replace(CALIBRATION, statistics_tokens=20_000))
    data = read_data(checkpoint, text, CALIBRATION)
    name = "encoder.layer.1.attention.output.dense"
    module, count = scores.modules[name], len(scores.modules[name].scores)
    dense = load_model(checkpoint, torch.device("cpu"))
    windows = data.training
    with torch.no_grad():
        before = data.task.outputs(dense, windows)
        weight = dense.get_parameter(f"{name}.weight")
        kept = weight.data.clone()
        predicted, measured = [], []
        for unit in module.order[:: count // 8]:
            without = tuple((int(k), int(k) + 1) for k in range(count) if k != unit)
            pair = factor_pair(kept, module, basis_moments(scores, module, kept), without, False)
            weight.data = pair.up @ pair.down
            loss = data.task.divergence(data.task.outputs(dense, windows), before) / len(windows)
            predicted.append(float(module.drop_loss[unit]))
            measured.append(float(loss))
    # One random projection a text estimates each loss; 300 texts leave some 10 % of noise, curvature the rest.
    assert np.corrcoef(np.log(predicted), np.log(measured))[0, 1] > 0.95
    assert 0.6 < sum(predicted) / sum(measured) < 1.6


def test_rounding_is_predicted_text_by_text(encoder: Path, text: Path) -> None:
    context = context_of(encoder, text, calibration=replace(CALIBRATION, batch=32))
    data, dense = context.data, context.model
    statistics = collect_statistics(replace(context, data=replace(data, statistics=data.training)))
    generator = torch.Generator().manual_seed(1)
    for name in ("encoder.layer.0.intermediate.dense", "encoder.layer.1.output.dense"):
        weight = dense.get_parameter(f"{name}.weight")
        kept, losses = weight.data.clone(), []
        with torch.no_grad():
            before = data.task.outputs(dense, data.training)
            for _ in range(8):
                weight.data = kept * (1 + 0.02 * torch.randn(kept.shape, generator=generator))
                losses.append(float(data.task.divergence(data.task.outputs(dense, data.training), before)))
            weight.data = kept
        measured = np.mean(losses) / len(data.training) / 0.02**2
        assert 0.6 < statistics.sensitivity[name] / measured < 1.6  # as above


def test_padding_changes_nothing(encoder: Path, text: Path) -> None:
    context = context_of(encoder, text, calibration=replace(CALIBRATION, context=40, batch=8))
    data, dense = context.data, context.model
    assert data.task.padding is not None
    wider = torch.nn.functional.pad(data.held_out[:8], (0, 2), value=data.task.padding)
    alone = torch.cat([data.task.outputs(dense, data.task.trimmed(row[None])) for row in data.held_out[:8]])
    torch.testing.assert_close(data.task.outputs(dense, wider), alone, atol=1e-5, rtol=0)  # float32 sums
    one, two = (
        collect_statistics(replace(context, data=replace(data, statistics=windows)))
        for windows in (data.held_out[:8], wider)
    )
    for key in one.inputs:
        np.testing.assert_allclose(one.inputs.diagonal(key), two.inputs.diagonal(key), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_pooling_is_read_from_the_model(tmp_path: Path, pooling: str) -> None:
    found = Checkpoint.open(make_encoder(tmp_path / "bert", pooling=pooling, normalize=False)).encoder
    assert found is not None and found.pooling == Pooling(pooling, False) and found.max_length == 48  # type: ignore[arg-type]


def test_bad_input(encoder: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one two three\n" * 50)
    with pytest.raises(DataError, match=r"1 different lines .* at least 20"):
        rank_model(encoder, short, algorithm="kfac")
    with pytest.raises(UsageError, match="predicts no next token"):
        rank_model(encoder, text, acip=AcipConfig(objective="ce"))
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    steps = json.loads((other / "modules.json").read_text())
    steps.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (other / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(UnsupportedError, match="step 'Dense'"):
        rank_model(other, text, algorithm="kfac")
    flags = json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True})
    shutil.copytree(encoder, tmp_path / "both")
    (tmp_path / "both" / "1_Pooling" / "config.json").write_text(flags)
    with pytest.raises(UnsupportedError, match="mean, cls or max alone"):
        rank_model(tmp_path / "both", text, algorithm="kfac")


def test_embedding_task_ignores_scale(encoder: Path) -> None:
    task = task_of(Checkpoint.open(encoder).encoder, {"pad": 0})
    unit = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    assert float(task.divergence(unit, unit)) == pytest.approx(0, abs=1e-6)
    assert float(task.divergence(-unit, unit)) == pytest.approx(8)
