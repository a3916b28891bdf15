from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from acip_export.artifacts.scores import find_scores, load_scores, rounded, save_scores
from acip_export.errors import ScoreFileError
from acip_export.model.checkpoint import Checkpoint
from tests.artifacts import examples
from tests.support import make_model, make_scores

Tensors = dict[str, torch.Tensor]
Metadata = dict[str, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)
    make_scores(model, adapters=True)
    return model


def _read(file: Path) -> tuple[Tensors, Metadata]:
    with safe_open(file, framework="pt") as opened:
        return load_file(file), dict(opened.metadata())


def test_round_trip(model: Path, tmp_path: Path) -> None:
    scores = load_scores(find_scores(model))
    save_scores(scores, tmp_path / "again.acip")
    again = load_scores(tmp_path / "again.acip")
    assert again.sha256 == scores.sha256  # the writer is deterministic
    assert (again.curve, again.algorithm, again.model) == (scores.curve, scores.algorithm, scores.model)
    for name, module in scores.modules.items():
        assert np.array_equal(again.modules[name].scores, module.scores)
        assert module.adapter_b is not None
        assert np.array_equal(again.modules[name].adapter_b, module.adapter_b)


def test_global_order_is_total(model: Path) -> None:
    scores = load_scores(find_scores(model))
    tied = replace(scores, modules={n: replace(m, scores=np.zeros_like(m.scores)) for n, m in scores.modules.items()})
    order = tied.global_order
    # All tied: module order, then unit index.
    assert order.positions.tolist() == list(range(sum(len(m.scores) for m in scores.modules.values())))
    assert order.owners.tolist() == sorted(order.owners.tolist())


def test_ranks_shrink_with_the_ratio(model: Path) -> None:
    scores = load_scores(find_scores(model))
    sizes = {name: m.shape[0] * m.shape[1] for name, m in scores.modules.items()}
    previous = scores.ranks_at(1.0)
    assert previous == {name: len(m.scores) for name, m in scores.modules.items()}
    for ratio in (0.9, 0.6, 0.3, 0.05):
        ranks = scores.ranks_at(ratio)
        assert all(ranks[name] <= previous[name] for name in ranks)
        kept = sum(min(r * sum(scores.modules[n].shape), sizes[n]) for n, r in ranks.items())
        assert kept <= ratio * sum(sizes.values())
        previous = ranks


def _first(tensors: Tensors, suffix: str) -> str:
    return next(name for name in tensors if name.endswith(suffix))


def _with_nan(tensors: Tensors, _metadata: Metadata) -> None:
    tensors[_first(tensors, "/scores")][0] = np.nan


def _with_half(tensors: Tensors, _metadata: Metadata) -> None:
    name = _first(tensors, "/scores")
    tensors[name] = tensors[name].half()


def _with_short(tensors: Tensors, _metadata: Metadata) -> None:
    name = _first(tensors, "/scores")
    tensors[name] = tensors[name][:-1].clone()


def _without_scores(tensors: Tensors, _metadata: Metadata) -> None:
    del tensors[_first(tensors, "/drop_loss")]


def _without_adapter(tensors: Tensors, _metadata: Metadata) -> None:
    del tensors[_first(tensors, "/adapter/b")]


def _with_other_scaling(_tensors: Tensors, metadata: Metadata) -> None:
    modules = json.loads(metadata["modules"])
    next(iter(modules.values()))["adapter_scaling"] = "twice"
    metadata["modules"] = json.dumps(modules)


def _with_version(_tensors: Tensors, metadata: Metadata) -> None:
    metadata["version"] = "99"


def _with_format(_tensors: Tensors, metadata: Metadata) -> None:
    metadata["artifact"] = "pt"


def _with_other_moments(_tensors: Tensors, metadata: Metadata) -> None:
    metadata["moments"] = "elsewhere"


def _with_bad_json(_tensors: Tensors, metadata: Metadata) -> None:
    metadata["curve"] = "{"


def _with_bad_modules(_tensors: Tensors, metadata: Metadata) -> None:
    metadata["modules"] = json.dumps({"x": {}})


BAD: dict[Callable[[Tensors, Metadata], None], str] = {
    _with_nan: "NaN",
    _with_half: "expected F32",
    _with_short: "has shape",
    _without_scores: "no singular/drop_loss",
    _without_adapter: "no adapter/b",
    _with_other_scaling: "invalid enum value 'twice'",
    _with_version: "version '99'",
    _with_format: "not a score file",
    _with_other_moments: "invalid enum value 'elsewhere'",
    _with_bad_json: "curve: ",
    _with_bad_modules: "modules: ",
}


@pytest.mark.parametrize("harm", BAD, ids=lambda f: f.__name__)
def test_damaged_files(harm: Callable[[Tensors, Metadata], None], model: Path, tmp_path: Path) -> None:
    tensors, metadata = _read(find_scores(model))
    harm(tensors, metadata)
    file = tmp_path / "bad.acip"
    save_file(tensors, file, metadata)
    with pytest.raises(ScoreFileError, match=BAD[harm]):
        load_scores(file)


def _harm(rows: torch.Tensor, row: int, value: float) -> torch.Tensor:
    harmed = rows.clone()
    harmed[row, 0] = value
    return harmed


ROWS, CODES = "second_moment/in/rows", "second_moment/in/codes"
BAD_MOMENTS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "of another dtype": (lambda t: t.update({ROWS: t[ROWS].half()}), "is F16, expected F32"),
    "codes of another dtype": (lambda t: t.update({CODES: t[CODES].float()}), "is F32, expected U8"),
    "of another size": (lambda t: t.update({ROWS: torch.ones(3, 5)}), "is of 5, expected 2"),
    "in one row": (lambda t: t.update({ROWS: torch.ones(6)}), r"rows of shape \(6,\), expected \(3, n\)"),
    "no rows": (lambda t: t.pop(ROWS), "codes of second moments without their rows"),
    "no codes": (lambda t: t.pop(CODES), "no list of codes"),
    "neither": (lambda t: (t.pop(ROWS), t.pop(CODES)), "'in' of 'model.layers.0.up' is missing"),
    "NaN": (lambda t: t.update({ROWS: _harm(t[ROWS], 0, torch.nan)}), "NaN or infinity"),
    "negative": (lambda t: t.update({ROWS: _harm(t[ROWS], 0, -1)}), "a diagonal that is negative"),
    "a bomb": (
        lambda t: t.update({CODES: torch.frombuffer(bytearray(zlib.compress(bytes(10**7))), dtype=torch.uint8)}),
        "has 2 codes, expected 1",
    ),
}


@pytest.mark.parametrize("harm", BAD_MOMENTS)
def test_damaged_moments(harm: str, tmp_path: Path) -> None:
    tensors, metadata = _read(examples.write_scores(tmp_path / "good.acip"))
    change, message = BAD_MOMENTS[harm]
    change(tensors)
    save_file(tensors, tmp_path / "bad.acip", metadata)
    with pytest.raises(ScoreFileError, match=message):
        _ = load_scores(tmp_path / "bad.acip").second_moments["in"]


def test_moments_come_back(tmp_path: Path) -> None:
    scores = load_scores(examples.write_scores(tmp_path / "one.acip"))
    save_scores(scores, tmp_path / "two.acip")
    assert (tmp_path / "two.acip").read_bytes() == (tmp_path / "one.acip").read_bytes()
    assert torch.equal(scores.second_moments["in"].unpacked(), torch.eye(2).double())


def test_a_slim_file_has_the_vectors(tmp_path: Path) -> None:
    whole = load_scores(examples.write_scores(tmp_path / "whole.acip"))
    save_scores(whole.without_moments(), tmp_path / "slim.acip")
    slim = load_scores(tmp_path / "slim.acip")
    assert slim.slim and not slim.second_moments and slim.sha256 != whole.sha256 and not whole.slim
    for name, module in whole.modules.items():
        other = slim.modules[name]
        assert (other.input_key, other.gradient_key) == ("", "")
        for vector in ("scores", "drop_loss", "up_sensitivity", "down_sensitivity", "input_moment", "gradient_moment"):
            assert np.array_equal(getattr(other, vector), getattr(module, vector))
    tensors, metadata = _read(tmp_path / "whole.acip")
    save_file(tensors, tmp_path / "both.acip", {**metadata, "moments": "left out"})
    with pytest.raises(ScoreFileError, match="leaves second moments out, and has 'in'"):
        load_scores(tmp_path / "both.acip")


def test_losses_have_three_digits() -> None:
    values = np.array([1.0, 1 / 3, 1e-9, 0, 3e38], np.float32)
    np.testing.assert_allclose(rounded(values), values, rtol=2.0**-8)
    assert np.array_equal(rounded(rounded(values)), rounded(values))


def test_truncated(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.acip"
    file.write_bytes(find_scores(model).read_bytes()[:-100])
    with pytest.raises(ScoreFileError, match="truncated"):
        load_scores(file)


def test_missing_and_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(ScoreFileError, match="acip-export rank"):
        find_scores(tmp_path)
    for name in ("a.acip", "b.acip"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ScoreFileError, match=r"a\.acip\n.*b\.acip"):
        find_scores(tmp_path)


def test_another_model(model: Path, tmp_path: Path) -> None:
    scores = load_scores(find_scores(model))
    scores.check_model(Checkpoint.open(model))
    retrained = make_model(tmp_path / "tiny", num_hidden_layers=1, seed=1)
    with pytest.raises(ScoreFileError, match="was made for 'tiny'"):
        scores.check_model(Checkpoint.open(retrained))


def test_an_empty_score_file_is_made_again_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "empty.acip").touch()
    with pytest.raises(ScoreFileError, match="is empty; make it again with  acip-export rank"):
        load_scores(tmp_path / "empty.acip")
