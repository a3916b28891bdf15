"""The shipped samples are what their records say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from acip_export.model.checkpoint import Checkpoint
from acip_export.text.packing import pack_text

SAMPLES = Path(__file__).parent.parent / "samples"
MODELS = sorted(file.parent for file in SAMPLES.glob("*/training.json"))


def test_there_are_samples() -> None:
    assert SAMPLES / "llama" in MODELS


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_sample_is_small_and_worth_compressing(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    record = json.loads((model / "training.json").read_text())
    assert checkpoint.weight_bytes <= 10_000_000
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.shape.kv_heads < checkpoint.shape.heads
    # Cutting every layer in half must hurt, or every quality table made from the sample would be empty.
    assert record["perplexity"]["uniform_svd_half"] >= 1.3 * record["perplexity"]["dense"]
    assert pack_text(model, SAMPLES / "text" / "evaluation.txt", 256).tokens > 50_000


def test_texts_are_disjoint() -> None:
    lines = {
        name: {
            hashlib.sha256(line.encode()).digest()
            for line in (SAMPLES / "text" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
            if len(line) > 60
        }
        for name in ("calibration", "evaluation")
    }
    shared = lines["calibration"] & lines["evaluation"]
    # Boilerplate that Python's modules share; the same file in both would share hundreds of long lines.
    assert len(shared) < 0.01 * len(lines["evaluation"])
