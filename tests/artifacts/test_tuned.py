"""``tuned.safetensors`` is taken whole, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from acip_export.artifacts.names import TUNED_FILE
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.tuned import Tuned, TuningResult, load_tuned, save_tuned
from acip_export.errors import TunedFileError
from tests.support import everywhere, make_model, make_plan

HELPED = TuningResult(4, 2048, 1.0, before=0.2, after=0.1)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    model = make_model(tmp_path_factory.mktemp("models") / "m", num_hidden_layers=1)
    pairs = everywhere(representation="factored", rank=8, up_type="int8", down_type="int8", embedding_type="int8")
    return replace(make_plan(model, "onnx", "factored", pairs), tune_seconds=60.0)


@pytest.fixture
def written(plan: Plan, tmp_path: Path) -> Path:
    factors = {
        f"{decision.module}.{part}.weight": torch.full(shape, 0.5).half()
        for decision in plan.tensors
        if decision.rank is not None
        for part, shape in (("up", (decision.shape[0], 8)), ("down", (8, decision.shape[1])))
    }
    norm = next(decision.name for decision in plan.tensors if len(decision.shape) == 1)
    save_tuned(Tuned(HELPED, {}, {norm: torch.ones(256)}, factors), plan, tmp_path / TUNED_FILE)
    return tmp_path


def changed(directory: Path, leave_out: str = "", **metadata: str) -> None:
    file = directory / TUNED_FILE
    with safe_open(file, "pt") as stored:
        names = list(stored.keys())
        tensors = {name: stored.get_tensor(name) for name in names if not leave_out or leave_out not in name}
        about = stored.metadata()
    save_file(tensors, file, {**about, **metadata})


def test_it_comes_back(written: Path, plan: Plan) -> None:
    tuned = load_tuned(written, plan)
    assert tuned is not None
    assert tuned.result == HELPED
    assert len(tuned.factors) == 14 and len(tuned.vectors) == 1 and not tuned.gains
    assert all(factor.dtype == torch.float16 for factor in tuned.factors.values())


@pytest.mark.parametrize("absent", ["up_proj.down", "up_proj.up", "up_proj"])
def test_a_pair_or_half_of_it_that_is_missing_is_named(absent: str, written: Path, plan: Plan) -> None:
    changed(written, leave_out=absent)
    with pytest.raises(TunedFileError, match=r"mlp\.up_proj\..*is missing; export again"):
        load_tuned(written, plan)


def test_numbers_of_a_tuning_that_did_not_help_are_refused(written: Path, plan: Plan) -> None:
    worse = {"steps": 4, "tokens": 2048, "seconds": 1.0, "before": 0.1, "after": 0.2}
    changed(written, result=json.dumps(worse))
    with pytest.raises(TunedFileError, match="did not help, and has numbers"):
        load_tuned(written, plan)
    changed(written, leave_out=".", result=json.dumps(worse))
    tuned = load_tuned(written, plan)
    assert tuned is not None and not tuned.factors
