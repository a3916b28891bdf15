"""Encoders are verified as language models are: structure, bytes, and a fresh process in the real runtime."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from acip_export import api as pipeline
from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import save_plan
from acip_export.artifacts.report import Report
from acip_export.errors import RuntimeCrashError, VerificationError
from acip_export.formats.registry import export_format
from acip_export.formats.session import Vectors
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import Encoder
from acip_export.planning import PlanRequest
from acip_export.ranking import automatic_config, rank_model
from acip_export.verification import encoders
from acip_export.verification.export import EvaluationText, verify_export
from acip_export.verification.process import measure_process
from acip_export.verification.structure import check_structure
from converters.onnx.runtimes.onnx_encoder import OnnxEncoderSession
from tests.encoders import CALIBRATION, lines_of_text, make_encoder
from tests.verification.conftest import Made, MakeExport, rename_gguf, transpose_onnx

CONTEXT = 40


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> MakeExport:
    """``encoded(target)``: ranked by the default algorithm in few steps, and small enough for factor pairs."""
    root = tmp_path_factory.mktemp("encoder")
    model, text = make_encoder(root / "bert"), lines_of_text(root / "lines.txt")
    checkpoint = Checkpoint.open(model)
    config = replace(automatic_config(checkpoint), learning_rate=1e-3, post_tune=10, batch=8)
    scores = rank_model(model, text, acip=config, calibration=CALIBRATION, out=model / "bert.acip")
    made: dict[str, Made] = {}

    def make(target: str) -> Made:
        if target not in made:
            request = PlanRequest(
                target, {"gguf": 120_000, "onnx": 170_000}[target], budget_scope="file", context=CONTEXT
            )
            plan = pipeline.plan_export(checkpoint, scores, request)
            pipeline.materialize_bundle(checkpoint, scores, plan, root / f"{target}-bundle")
            pipeline.convert_bundle(root / f"{target}-bundle", root / target)
            made[target] = Made(model, root / f"{target}-bundle", root / target, plan)
        return made[target]

    return make


def text_of(made: Made) -> EvaluationText:
    return pipeline.evaluation_text(made.model, made.model.parent / "lines.txt", CONTEXT)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_report(encoded: MakeExport, target: str) -> None:
    made = encoded(target)
    report = verify_export(made.export, Bundle.open(made.bundle), text_of(made), made.model)
    assert report.passed and not report.notes and report.written_bytes == made.plan.planned_bytes
    assert report.structure is not None
    assert report.structure.found == report.structure.tensors >= len(made.plan.tensors)
    (runtime,) = report.runtimes
    assert runtime.load_seconds is not None and runtime.load_seconds > 0
    assert runtime.speed is not None and runtime.speed.prefill > 0
    assert (runtime.speed.decode, runtime.speed.new_tokens) == (None, 0)
    assert runtime.speed.prompt_tokens == made.plan.serving.prompt_batch
    assert report.similarity is not None and 0.8 < report.similarity < 1
    memory = runtime.memory
    assert memory is not None and memory.within_budget is None  # the budget is one of files
    session = export_format(target).encoder_session
    assert session is not None
    base = export_format(target).memory.process(Checkpoint.open(made.model), session.runtime).total
    assert memory.predicted_bytes == made.plan.memory_bytes + base == made.plan.process_bytes
    # The bound holds; page caches and allocators move peaks by up to 1 MB from run to run.
    assert memory.peak_bytes <= memory.predicted_bytes + 1_000_000


@pytest.mark.usefixtures("kept_at_once")
def test_an_interrupted_one_computes_what_is_missing(
    encoded: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the bundle's texts: the runtime's vectors, and those of the texts before, are not computed again."""
    made = encoded("onnx")
    export, text = Path(shutil.copytree(made.export, tmp_path / "export")), text_of(made)
    outputs, runtime_outputs, computed = encoders._outputs, OnnxEncoderSession.outputs, {"torch": 0, "runtime": 0}

    def verify() -> Report:
        return verify_export(export, Bundle.open(made.bundle), text, made.model)

    expected = verify()
    texts = min(len(text.windows), encoders._MOST_TEXTS)
    stops = [2 * encoders._TOGETHER]
    assert texts > stops[0] + encoders._TOGETHER

    def in_torch(model: object, encoder: Encoder, some: Sequence[list[int]]) -> Vectors:
        if stops and computed["torch"] >= stops[0]:
            raise KeyboardInterrupt
        computed["torch"] += len(some)
        return outputs(model, encoder, some)

    def in_runtime(session: OnnxEncoderSession, some: Sequence[list[int]]) -> Vectors:
        computed["runtime"] += len(some)
        return runtime_outputs(session, some)

    monkeypatch.setattr(encoders, "_outputs", in_torch)
    monkeypatch.setattr(OnnxEncoderSession, "outputs", in_runtime)
    with pytest.raises(KeyboardInterrupt):
        verify()
    assert (tmp_path / ".export.verification").is_dir()
    stops.clear()
    found = verify()
    assert computed == {"torch": 2 * texts, "runtime": texts}  # bundle and dense model once
    assert (found.runtimes[0].agreement, found.similarity) == (expected.runtimes[0].agreement, expected.similarity)
    assert not (tmp_path / ".export.verification").exists()


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_process_above_its_budget_fails(encoded: MakeExport, tmp_path: Path, target: str) -> None:
    """A plan that claims that the runtime takes nothing, and sets its budget by that."""
    made = encoded(target)
    bundle, export = tmp_path / "bundle", tmp_path / "export"
    shutil.copytree(made.bundle, bundle)
    shutil.copytree(made.export, export)
    breakdown = {**made.plan.breakdown, "runtime_library": 0, "runtime_tokenizer": 0}
    promised = replace(made.plan, breakdown=breakdown, anonymous={}, budget_scope="process", budget_bytes=1_000_000)
    for file in (bundle / "plan.json", export / "plan.json"):
        save_plan(promised, file, force=True)
    report = verify_export(export, Bundle.open(bundle))
    assert not report.passed and "does not hold" in report.failures[0]


def test_memory_of_a_large_vocabulary(tmp_path: Path) -> None:
    """llama.cpp makes room for logits of every token that it encodes, which no log tells of: here 36 MB."""
    model = make_encoder(tmp_path / "bert", vocab_size=30_000, max_position_embeddings=300)
    text = lines_of_text(tmp_path / "lines.txt")
    scores = rank_model(model, text, algorithm="magnitude", calibration=CALIBRATION, out=model / "bert.acip")
    checkpoint = Checkpoint.open(model)
    plan = pipeline.plan_export(
        checkpoint, scores, PlanRequest("gguf", 200_000_000, budget_scope="process", context=300)
    )
    pipeline.export_model(checkpoint, scores, plan, tmp_path / "export", verify=False)
    session = export_format("gguf").encoder_session
    assert session is not None
    memory = measure_process(session.module, session.name, tmp_path / "export").memory
    assert memory is not None
    # As above; what stays on the disk of library and vocabulary is a third of the rest at most.
    assert 0.7 * plan.process_bytes <= memory.peak_bytes <= plan.process_bytes + 1_000_000


@pytest.mark.parametrize(
    ("target", "damage", "message"),
    [
        ("gguf", rename_gguf, "blk.1.attn_q.weight is missing"),
        (
            "onnx",
            partial(transpose_onnx, name="layer.1.attention.self.query"),
            "is there for encoder.layer.1.attention.self.query",
        ),
    ],
)
def test_structure_finds_what_size_does_not(
    encoded: MakeExport, tmp_path: Path, target: str, damage: object, message: str
) -> None:
    made = encoded(target)
    copy = tmp_path / target
    shutil.copytree(made.export, copy)
    assert callable(damage)
    damage(copy)
    structure, failures = check_structure(export_format(target), copy, Bundle.open(made.bundle))
    assert structure is not None and structure.found < structure.tensors
    assert re.search(message, failures[0])


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_damaged_file_takes_nobody_along(encoded: MakeExport, tmp_path: Path, target: str) -> None:
    made = encoded(target)
    copy = tmp_path / target
    shutil.copytree(made.export, copy)
    file = copy / {"gguf": "model.gguf", "onnx": "onnx/model.onnx"}[target]
    file.write_bytes(file.read_bytes()[:2000])
    session = export_format(target).encoder_session
    assert session is not None
    with pytest.raises((VerificationError, RuntimeCrashError), match=r"cannot|was ended by"):
        measure_process(session.module, session.name, copy)


def test_batches_are_those_of_the_plan(encoded: MakeExport) -> None:
    """Texts of any lengths in any order give the vectors that each gives alone; too long ones are refused."""
    made = encoded("onnx")
    texts = [[2, *range(10, 10 + length), 3] for length in (30, 2, 11, 2, 38)]
    with OnnxEncoderSession(made.export, replace(made.plan.serving, prompt_batch=80), threads=1) as session:
        together = session.outputs(texts)
        for row, text in zip(together, texts, strict=True):
            np.testing.assert_allclose(session.outputs([text])[0], row, atol=1e-5)  # float32 sums of unit vectors
        with pytest.raises(VerificationError, match="41 tokens do not fit the export's texts of 40"):
            session.outputs([[5] * 41])
