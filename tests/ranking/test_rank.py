"""The whole stage: files in, a score file out that the other stages can trust."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from acip_export.artifacts.scores import ScoreFile, load_scores
from acip_export.errors import AcipError, UsageError
from acip_export.materialization.factors import basis_moments, dense_weight, factor_pair
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Progress
from acip_export.ranking import AcipConfig, DataConfig, rank_model
from acip_export.ranking.data import WindowStream, read_data
from acip_export.ranking.load import load_model
from tests.ranking.support import CALIBRATION, calibration_text, held_out_divergence, held_out_loss, sharp_model

QUICK = AcipConfig(
    basis="kfac",
    start="drop-loss",
    learning_rate=2e-3,
    penalty=1e-2,
    penalty_growth=1.5,
    post_tune=8,
    post_tune_sizes="sampled",
    batch=2,
    adapter_rank=4,
)


@pytest.fixture(scope="module", params=["constant", "dropped"])
def ranked(
    request: pytest.FixtureRequest, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> ScoreFile:
    file = tmp_path_factory.mktemp("scores") / "scores.acip"
    config = replace(QUICK, adapter_scaling=request.param)
    rank_model(model, text, acip=config, calibration=CALIBRATION, out=file)
    return load_scores(file)


def test_score_file_is_complete(ranked: ScoreFile, model: Path, text: Path) -> None:
    checkpoint = Checkpoint.open(model)
    ranked.check_model(checkpoint)
    assert ranked.algorithm["name"] == "acip" and ranked.basis == "kfac" and ranked.algorithm["seed"] == 0
    assert ranked.algorithm["batch"] == QUICK.batch != CALIBRATION.batch
    assert ranked.data.source == str(text) and ranked.data.tokens > 4096
    assert [point.ratio for point in ranked.curve] == [1.0, 0.9, 0.8, 0.6, 0.4, 0.2]
    assert list(ranked.embedding_sensitivity) == ["model.embed_tokens.weight"]
    for name, (out, inputs) in checkpoint.linear_modules.items():
        module = ranked.modules[name]
        assert ranked.second_moments[module.input_key].size == inputs
        assert ranked.second_moments[module.gradient_key].size == min(out, inputs)
        assert module.sensitivity > 0 and (module.drop_loss > 0).all()
    assert len(ranked.global_order.positions) == sum(min(shape) for shape in checkpoint.linear_modules.values())


@pytest.mark.parametrize("adapters", [False, True])
def test_curve_is_measured_on_what_is_materialized(ranked: ScoreFile, model: Path, text: Path, adapters: bool) -> None:
    checkpoint = Checkpoint.open(model)
    windows = read_data(checkpoint, text, CALIBRATION).held_out
    dense = load_model(checkpoint, torch.device("cpu"))
    for point in ranked.curve[::2]:
        rebuilt = load_model(checkpoint, torch.device("cpu"))
        for name, rank in ranked.ranks_at(point.ratio).items():
            module, (out, inputs) = ranked.modules[name], ranked.modules[name].shape
            weight = rebuilt.get_parameter(f"{name}.weight")
            if rank * (out + inputs) >= out * inputs:
                weight.data = dense_weight(weight.data, module, adapters)
                continue
            kept = tuple((int(unit), int(unit) + 1) for unit in np.sort(module.order[:rank]))
            pair = factor_pair(weight.data, module, basis_moments(ranked, module, weight.data), kept, adapters)
            weight.data = pair.up @ pair.down
        measured = point.loss_with_adapters if adapters else point.loss
        divergence = point.divergence_with_adapters if adapters else point.divergence
        # The same float32 numbers multiplied in another order.
        assert held_out_loss(rebuilt, windows, 8) == pytest.approx(measured, abs=2e-4)
        assert held_out_divergence(rebuilt, dense, windows) == pytest.approx(divergence, abs=2e-4)
    assert (ranked.curve[0].divergence, ranked.curve[0].spearman) == (0, None)
    assert (ranked.curve[4].divergence_with_adapters or 0) > 0.01


def test_adapters_scaled_by_what_is_dropped_leave_the_whole_model_alone(ranked: ScoreFile) -> None:
    whole, cut = ranked.curve[0], ranked.curve[4]
    dropped = ranked.algorithm["adapter_scaling"] == "dropped"
    assert (whole.loss_with_adapters == whole.loss) == dropped
    assert cut.loss_with_adapters != cut.loss


@pytest.mark.slow
def test_same_seed_same_bytes(model: Path, text: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.acip", "b.acip", "c.acip")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        torch.manual_seed(hash(file.name) % 1000)  # nothing may depend on the caller's generator
        rank_model(model, text, acip=QUICK, calibration=replace(CALIBRATION, seed=seed), out=file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize(
    ("algorithm", "basis"), [("magnitude", "svd"), ("energy", "input"), ("kfac", "kfac"), ("fisher", "kfac")]
)
def test_training_free_orders(model: Path, text: Path, algorithm: str, basis: str) -> None:
    ranked = rank_model(model, text, algorithm=algorithm, calibration=CALIBRATION)
    assert ranked.basis == basis
    assert all(point.loss_with_adapters is None for point in ranked.curve)
    for module in ranked.modules.values():
        descending = np.diff(module.scores) <= 1e-6 * module.scores.max()
        # By singular value; measured on the masks, neighbours may change places.
        assert descending.all() if algorithm != "fisher" else descending.mean() > 0.5


def test_progress_names_every_stage(model: Path, text: Path) -> None:
    seen: list[Progress] = []
    rank_model(model, text, acip=QUICK, calibration=CALIBRATION, progress=seen.append)
    assert list(dict.fromkeys(p.stage for p in seen)) == ["statistics", "components", "masks", "post-tune", "curve"]
    for stage in ("statistics", "components", "post-tune", "curve"):
        last = [p for p in seen if p.stage == stage][-1]
        assert last.done == last.total and last.eta_seconds == 0
    assert [p for p in seen if p.stage == "masks"][-1].ratio <= 0.4


@pytest.mark.parametrize("stage", ["statistics", "masks", "curve"])
def test_interrupt_leaves_nothing(model: Path, text: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=tmp_path / "scores.acip", progress=interrupt)
    # From the first step of the masks on there is a run to go on with; a score file, never.
    kept = {"scores.acip.run"} if stage in ("masks", "post-tune", "curve") else set()
    assert {file.name for file in tmp_path.iterdir()} <= kept


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"algorithm": "best"}, UsageError, "unknown ranking algorithm 'best'; known: acip, energy"),
        ({"algorithm": "kfac", "acip": QUICK}, UsageError, "kfac has no settings; .* rank with acip"),
        ({"out": Path(__file__)}, UsageError, "already exists"),
    ],
)
def test_refused_before_anything_is_read(
    tmp_path: Path, arguments: dict[str, object], error: type[AcipError], message: str
) -> None:
    with pytest.raises(error, match=message):
        rank_model(tmp_path / "no-model", tmp_path / "no-text", **arguments)


def test_curve_on_a_text_of_its_own(model: Path, text: Path, tmp_path: Path) -> None:
    other = calibration_text(tmp_path / "other.txt", repeats=20)
    data = read_data(Checkpoint.open(model), text, CALIBRATION, other)
    assert len(data.training) == len(data.text.windows)
    assert len(data.held_out) == 1024 // 32
    curve = rank_model(model, text, algorithm="kfac", calibration=CALIBRATION, evaluation=other).curve
    dense = load_model(Checkpoint.open(model), torch.device("cpu"))
    # The factorized model is the dense one up to float32 rounding.
    assert curve[0].loss == pytest.approx(held_out_loss(dense, data.held_out, 8), abs=1e-5)


@pytest.mark.parametrize("changes", [{"stop_ratio": 0.0}, {"batch": 0}, {"learning_rate": -1.0}, {"post_tune": -1}])
def test_impossible_settings(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        AcipConfig(**changes)


def test_held_out_text_is_not_trained_on(model: Path, text: Path) -> None:
    data = read_data(Checkpoint.open(model), text, CALIBRATION)
    assert len(data.training) + len(data.held_out) == len(data.text.windows)
    torch.testing.assert_close(torch.cat([data.training, data.held_out]), data.text.windows)


def test_windows_come_once_per_pass_in_an_order_that_position_alone_decides() -> None:
    windows = torch.arange(12).view(6, 2)
    stream = WindowStream(windows, 2, seed=3)
    passes = [torch.cat([next(stream) for _ in range(3)]) for _ in range(2)]
    for one in passes:
        torch.testing.assert_close(one[:, 0].sort().values, windows[:, 0])
    assert not torch.equal(*passes)
    torch.testing.assert_close(next(WindowStream(windows, 2, seed=3, position=4)), passes[1][2:4])


def test_default_context_is_the_models_limit(text: Path, tmp_path: Path) -> None:
    model = sharp_model(tmp_path / "model")
    assert read_data(Checkpoint.open(model), text, DataConfig()).training.shape[1] == 64


def test_tokens_suit_the_models_size() -> None:
    small, large = DataConfig().for_weights(4_000_000), DataConfig().for_weights(8_000_000_000)
    assert (small.statistics_tokens, small.gradient_tokens) == (40_960, 24_576)
    assert (large.statistics_tokens, large.gradient_tokens) == (8_192, 4_096)
    told = DataConfig(statistics_tokens=1_000).for_weights(4_000_000)
    assert (told.statistics_tokens, told.gradient_tokens) == (1_000, 1_000)
