"""What commands print, where it does not take a command to see it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from acip_export.cli.tables.plan import show_plan
from tests.support import dense, make_model, make_plan


@pytest.mark.parametrize("layers", ["model.layers.", "transformer.h.", "bert.encoder.layer."])
def test_layers_share_a_row_whatever_they_are_called(
    layers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(make_model(tmp_path / "m"), "gguf", "stock", dense(type="q8_0"))
    renamed = tuple(replace(d, name=d.name.replace("model.layers.", layers)) for d in plan.tensors)
    breakdown = {"weights": 1, "kv_cache": 0, "compute": 0, "output": 0}
    show_plan(replace(plan, tensors=renamed, breakdown=breakdown), verbose=False)
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "512x256" in line]
    assert ["mlp.up_proj", "2"] in rows
    assert not any(".0." in name for name, *_ in rows)
