from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from acip_export.artifacts.scores import find_scores, load_scores, save_scores
from acip_export.errors import ScoreFileError
from acip_export.model.checkpoint import Checkpoint
from tests.support import make_model, make_scores

Tensors = dict[str, np.ndarray]
Metadata = dict[str, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)
    make_scores(model, adapters=True)
    return model


def _read(file: Path) -> tuple[Tensors, Metadata]:
    with safe_open(file, framework="numpy") as opened:
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
    tensors[name] = tensors[name].astype(np.float16)


def _with_short(tensors: Tensors, _metadata: Metadata) -> None:
    name = _first(tensors, "/scores")
    tensors[name] = tensors[name][:-1].copy()


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
