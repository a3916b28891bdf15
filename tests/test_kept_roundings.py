"""What an export was rounded to is not rounded again when it is verified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acip_export import error_feedback
from acip_export.formats.registry import export_format
from acip_export.kept_roundings import KeptRoundings
from tests.gguf.test_feedback import matrix, moment, moments_of

TYPES = {"gguf": "q4_0", "onnx": "int4"}


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_a_matrix_is_rounded_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    round_trip, type = export_format(name).round_trip, TYPES[name]
    weight, inputs = matrix(48), moments_of(moment(256, 8, 0))
    expected = round_trip(weight, type, inputs)
    keeping = replace(inputs, kept=KeptRoundings(tmp_path))
    assert torch.equal(round_trip(weight.bfloat16(), type, keeping), round_trip(weight.bfloat16(), type, inputs))
    assert torch.equal(round_trip(weight, type, keeping), expected)
    assert len(list(tmp_path.iterdir())) == 2
    rounded: list[int] = []
    once = error_feedback._Block.round

    def counted(self: error_feedback._Block, *arguments: object) -> None:
        rounded.append(1)
        once(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(error_feedback._Block, "round", counted)
    assert torch.equal(round_trip(weight, type, keeping), expected)
    assert not rounded
    # Whatever else it depends on makes it another one.
    other = moments_of(moment(256, 8, 1))
    for changed in (replace(keeping, importance=other.importance), replace(keeping, feedback=other.feedback)):
        assert torch.equal(round_trip(weight, type, changed), round_trip(weight, type, replace(changed, kept=None)))
    assert torch.equal(round_trip(weight.flip(0), type, keeping), round_trip(weight.flip(0), type, inputs))
    assert len(list(tmp_path.iterdir())) == 5
    assert rounded
