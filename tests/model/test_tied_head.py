"""Heads that are stored although the configuration says that they are the embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from acip_export.errors import CheckpointError
from acip_export.model.checkpoint import Checkpoint
from tests.encoders import make_encoder
from tests.support import Run, make_model, make_scores

EMBEDDINGS = {"lm_head": "model.embed_tokens", "cls.predictions.decoder": "bert.embeddings.word_embeddings"}


def tiny(directory: Path, **settings: Any) -> Path:
    return make_model(directory, "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, **settings)


def masked(directory: Path) -> Path:
    return make_encoder(directory, "masked-lm")


def store_head(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(model / "model.safetensors")
    assert f"{name}.weight" not in tensors
    tensors[f"{name}.weight"] = change(tensors[f"{EMBEDDINGS[name]}.weight"]).clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def last_row_differs(weight: torch.Tensor) -> torch.Tensor:
    changed = weight.clone()
    changed[-1] += 1
    return changed


CHANGES = {
    "the last row": last_row_differs,
    "the precision": torch.Tensor.half,
    "the number of rows": lambda weight: weight[:-8],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("make", "head"), [(tiny, "lm_head"), (masked, "cls.predictions.decoder")])
def test_a_head_of_its_own_is_refused(tmp_path: Path, make: Callable[[Path], Path], head: str, change: str) -> None:
    model = make(tmp_path / "m")
    store_head(model, head, CHANGES[change])
    with pytest.raises(CheckpointError, match="mixes tied and untied heads"):
        Checkpoint.open(model)


@pytest.mark.parametrize("make_head", [(tiny, "lm_head"), (masked, "cls.predictions.decoder")])
def test_a_copy_is_left_out(tmp_path: Path, make_head: tuple[Callable[[Path], Path], str]) -> None:
    make, head = make_head
    model = make(tmp_path / "m")
    plain = Checkpoint.open(model)
    names, fingerprint = plain.tensors.keys(), plain.fingerprint
    store_head(model, head, torch.Tensor.clone)
    again = Checkpoint.open(model)
    assert again.tensors.keys() == names
    assert again.fingerprint == fingerprint


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    model = tiny(tmp_path / "m", tie_word_embeddings=False)
    assert "lm_head.weight" in Checkpoint.open(model).tensors


@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_the_command_line_writes_nothing(tmp_path: Path, target: str, run: Run) -> None:
    model = tiny(tmp_path / "m")
    make_scores(model)
    store_head(model, "lm_head", last_row_differs)
    done = run("--model", model, "--budget", "50MB", "--format", target, "-o", tmp_path / "out")
    assert done.code == CheckpointError.exit_code
    assert "tie_word_embeddings" in done.err
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
