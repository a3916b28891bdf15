"""Block by block, a model gives the very logits that it gives as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from acip_export.artifacts.bundle import Bundle, load_bundle
from acip_export.errors import BundleError, CheckpointError, UnsupportedError
from acip_export.formats.registry import export_format
from acip_export.model.block_model import StoredCheckpoint
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import load_causal_lm
from acip_export.verification.reference import Reference, open_reference, pass_dense
from tests.support import make_bundle, make_model, make_plan

generator = np.random.default_rng(0)
WINDOWS = [generator.integers(0, 512, length) for length in (40, 40, 17)]
DENSE = {"representation": "dense", "type": "q8_0"}
# What sets an architecture's blocks apart: layers of two kinds, logits that are capped or scaled, one matrix for three,
# position embeddings and Conv1D, distances (alibi) with a row for every head, a head that is not the embedding.
ARCHITECTURES = {
    "gemma2": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 3.0},
    "phi3": {},
    "gpt2": {},
    "bloom": {},
    "qwen3": {"tie_word_embeddings": False},
}


def whole(model: torch.nn.Module) -> list[np.ndarray]:
    with torch.no_grad():
        return [model(input_ids=torch.from_numpy(window)[None]).logits[0].numpy() for window in WINDOWS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_a_dense_model(tmp_path: Path, architecture: str) -> None:
    model = make_model(tmp_path / "m", architecture, torch.bfloat16, **ARCHITECTURES[architecture])
    expected = whole(load_causal_lm(Checkpoint.open(model), torch.float32))
    passed = pass_dense(model, WINDOWS)
    for found, logits in zip(passed.logits(), expected, strict=True):
        np.testing.assert_array_equal(found, logits)
    np.testing.assert_array_equal(next(passed.logits(2)), expected[2])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("file_format", ["gguf", "onnx"])
def test_a_bundle_with_its_exports_numbers(
    tmp_path: Path, file_format: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs and dense layers, rounded; the embedding by the rows that the windows have, the head in slices."""
    model = make_model(tmp_path / "m", tie_word_embeddings=tied)
    types = {"gguf": ("q4_0", "q8_0"), "onnx": ("int4-b64", "int8")}[file_format]

    def decide(name: str, _shape: tuple[int, ...]) -> dict[str, object]:
        if "mlp" in name:
            return {"representation": "factored", "rank": 64, "up_type": types[0], "down_type": types[1]}
        return {"representation": "dense", "type": types[1]}

    bundle = make_bundle(model, make_plan(model, file_format, "factored", decide), tmp_path / "b")
    round_trip = export_format(file_format).round_trip
    monkeypatch.setattr("acip_export.model.block_model._SLICE", 10_000)
    monkeypatch.setattr("acip_export.model.block_model.ROWS_AT_ONCE", 100)
    expected = whole(load_bundle(bundle.path, round_trip))
    for found, logits in zip(open_reference(bundle, round_trip).passed(WINDOWS).logits(), expected, strict=True):
        np.testing.assert_allclose(found, logits, atol=1e-6)
    exact = whole(load_bundle(bundle.path))
    assert np.abs(exact[0] - expected[0]).max() > 1e-4


def test_windows_of_other_lengths_do_not_disturb_each_other(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    together = list(pass_dense(model, WINDOWS).logits())
    for window, logits in zip(WINDOWS, together, strict=True):
        np.testing.assert_array_equal(next(pass_dense(model, [window]).logits()), logits)


def test_blocks_that_are_no_chain_are_refused(tmp_path: Path) -> None:
    reference = Reference(StoredCheckpoint(Checkpoint.open(make_model(tmp_path / "m"))))
    reference._model.modules.reverse()
    with pytest.raises(UnsupportedError, match=r"layers\.1 does not read what model\.layers\.0 returns"):
        reference.passed(WINDOWS)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    checkpoint = Checkpoint.open(model)
    wide = Checkpoint(model, {**checkpoint.config, "num_hidden_layers": 3}, checkpoint.tensors)
    with pytest.raises(CheckpointError, match=r"missing \['model\.layers\.2"):
        Reference(StoredCheckpoint(wide))
    bundle = make_bundle(model, make_plan(model, "gguf", "stock", lambda *_: DENSE), tmp_path / "b")
    narrow = Bundle(bundle.path, bundle.plan, bundle.manifest, dict(list(bundle.tensors.items())[1:]))
    with pytest.raises(BundleError, match="does not fit its architecture: missing"):
        open_reference(narrow, None)


def test_a_dense_models_states_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = make_model(tmp_path / "m"), tmp_path / "cache"
    expected = list(pass_dense(model, WINDOWS, cache).logits())
    (file,) = cache.iterdir()
    pass_dense(model, WINDOWS[:2], cache)
    assert len(list(cache.iterdir())) == 2
    once = Reference.passed
    monkeypatch.setattr(Reference, "passed", lambda *_: pytest.fail("passed again"))
    for found, logits in zip(pass_dense(model, WINDOWS, cache).logits(), expected, strict=True):
        np.testing.assert_array_equal(found, logits)
    monkeypatch.setattr(Reference, "passed", once)
    file.write_bytes(file.read_bytes()[:-8])  # damaged: made again
    for found, logits in zip(pass_dense(model, WINDOWS, cache).logits(), expected, strict=True):
        np.testing.assert_array_equal(found, logits)
