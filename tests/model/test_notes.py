"""What runtimes leave to the caller is said in the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.notes import model_notes
from acip_export.model.opening import check_checkpoint
from tests.encoders import make_encoder
from tests.support import Run, make_model, make_scores

LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(("context", "said"), [(16, False), (64, True)])
@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_longrope(format: str, context: int, said: bool, tmp_path: Path, run: Run) -> None:
    model = make_model(
        tmp_path / "model", "phi3", hidden_size=64, intermediate_size=96, head_dim=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **LONG},
        original_max_position_embeddings=16,
    )  # fmt: skip
    make_scores(model)
    done = run("plan", "--model", model, "--budget", "50MB", "--format", format, "--context", context, "--json",
               "--types", "f16" if format == "gguf" else "f32", "-o", tmp_path / "plan.json")  # fmt: skip
    assert done.code == 0, done.err
    notes = json.loads((tmp_path / "plan.json").read_text())["notes"]
    assert any("two sets of factors (longrope)" in note for note in notes) == said


def settings(model: Path, **fields: Any) -> None:
    (model / "config_sentence_transformers.json").write_text(json.dumps(fields))


def test_what_sentence_transformers_does_around_a_model(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    assert model_notes(Checkpoint.open(model), 48) == ()
    settings(model, truncate_dim=16, prompts={"query": "query: ", "passage": ""}, default_prompt_name="query")
    cut, prompt = model_notes(Checkpoint.open(model), 48)
    assert "first 16 numbers" in cut and "all 64" in cut
    assert "'query: ' before every text" in prompt
    settings(model, truncate_dim=64, prompts={"query": "query: "}, default_prompt_name=None)
    assert model_notes(Checkpoint.open(model), 48) == ()


@pytest.mark.parametrize(
    "fields", [{"truncate_dim": "16"}, {"truncate_dim": 0}, {"prompts": ["a"]}, {"default_prompt_name": "absent"}]
)
def test_damaged_settings(fields: dict[str, Any], tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    settings(model, **fields)
    with pytest.raises(CheckpointError, match=r"config_sentence_transformers\.json: "):
        check_checkpoint(Checkpoint.open(model))


def test_prompts_that_are_not_pooled_are_refused(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    file = model / "1_Pooling/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "include_prompt": False}))
    check_checkpoint(Checkpoint.open(model))  # there is none
    settings(model, prompts={"query": "query: "})
    with pytest.raises(UnsupportedError, match="include_prompt is false"):
        check_checkpoint(Checkpoint.open(model))
