"""The proof of an export: what it says of a good one, and that each way to be bad is found."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from functools import partial
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch

from acip_export import api as pipeline
from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import Plan, save_plan
from acip_export.artifacts.report import Report
from acip_export.check.config import load_config
from acip_export.check.quality import read_quality
from acip_export.errors import BundleError
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import load_dense
from acip_export.progress import Progress
from acip_export.verification import metrics as measure
from acip_export.verification.export import verify_export
from acip_export.verification.structure import check_structure
from tests.verification.conftest import CONTEXT, Made, MakeExport, rename_gguf, transpose_onnx


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def verified(request: pytest.FixtureRequest, exported: MakeExport, text: Path) -> tuple[Made, Report]:
    made = exported(request.param)
    return made, pipeline.verify_directory(made.export, str(made.model), None, made.bundle, text)


@pytest.mark.parametrize("with_text", [True, False])
def test_progress_counts_to_the_end(with_text: bool, exported: MakeExport, text: Path) -> None:
    """Block by block and window by window, so that minutes of verifying are no standstill."""
    made, seen = exported("onnx"), list[Progress]()
    pipeline.verify_directory(
        made.export, str(made.model), None, made.bundle, text if with_text else None, progress=seen.append
    )
    own = [report for report in seen if report.stage == "verify"]
    assert len({report.total for report in own}) == 1
    done = [report.done for report in own]
    assert done == sorted(done)
    assert done[0] == 0 and done[-1] == own[-1].total
    assert max(after - before for before, after in itertools.pairwise(done)) <= (own[-1].total or 0) / 3
    assert len(set(done)) > 6


def test_a_good_export_passes(verified: tuple[Made, Report]) -> None:
    made, report = verified
    assert report.passed, report.failures
    assert report.structure is not None
    assert report.structure.found == report.structure.tensors > len(made.plan.tensors) - 1
    for file in report.files:
        content = (made.export / file.name).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert file.bytes == file.planned_bytes
    assert report.text is not None
    assert report.text.tokens == report.text.windows * report.text.window_tokens
    assert report.text.window_tokens == CONTEXT
    for runtime in report.runtimes:
        assert runtime.load_seconds > 0
        assert runtime.memory is None or runtime.memory.within_budget
    # What was returned is what was written, and what check reads.
    written = json.loads((made.export / "report.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    quality = read_quality(made.export / "report.json")
    assert quality.load_seconds == report.runtimes[0].load_seconds
    assert quality.measure == "perplexity"


def test_quality_is_what_torch_says(verified: tuple[Made, Report], text: Path) -> None:
    """Every figure again, the plain way: all logits at once, in float64."""
    made, report = verified
    windows = pipeline.evaluation_text(made.model, text, CONTEXT).windows
    model = load_dense(Checkpoint.open(made.model), torch.float32)
    with torch.no_grad():
        dense = model(torch.from_numpy(windows)).logits.double().numpy()
    logs = torch.log_softmax(torch.from_numpy(dense[:, :-1]), -1)
    losses = -logs.gather(-1, torch.from_numpy(windows[:, 1:, None]))[..., 0].flatten()
    assert report.dense_perplexity is not None
    assert report.dense_perplexity.mean_loss == pytest.approx(float(losses.mean()), rel=1e-6)
    assert report.dense_perplexity.standard_error == pytest.approx(float(losses.std()) / len(losses) ** 0.5, rel=1e-6)
    assert report.dense_perplexity.tokens == len(losses) == windows.shape[0] * (CONTEXT - 1)
    found = report.runtimes[0].divergence
    own = report.runtimes[0].perplexity
    assert found is not None
    assert own is not None
    assert found.loss_difference == pytest.approx(own.mean_loss - report.dense_perplexity.mean_loss, abs=1e-12)
    assert own.mean_loss == pytest.approx(log(own.perplexity))
    # Rounded to eight bits: not the dense model, and close to it.
    assert 0 < found.mean_kl < 0.05
    assert 0 < found.kl_standard_error < found.mean_kl
    # Paired: far smaller than the error of either loss.
    assert found.loss_difference_standard_error < 0.5 * own.standard_error
    assert found.same_top > 0.7


def test_divergence_against_a_direct_calculation(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.normal(0, 2, (3, 20, 11)).astype(np.float32) for _ in range(2))
    windows = generator.integers(0, 11, (3, 20))
    p, q = (torch.from_numpy(x[:, :-1]).double() for x in (a, b))
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).flatten()
    for piece in (1, 50, 1 << 22):  # whatever the pieces
        monkeypatch.setattr(measure, "_PIECE", piece)
        figures = [measure.token_figures(*each) for each in zip(a, b, windows, strict=True)]
        dense, own, found = measure.compare_with_dense(figures)
        assert found.mean_kl == pytest.approx(float(kl.mean()))
        assert found.kl_standard_error == pytest.approx(float(kl.std()) / len(kl) ** 0.5)
        assert found.kl_999 == pytest.approx(float(torch.quantile(kl, 0.999)))
        assert found.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
        for perplexity, logits in ((own, b), (dense, a)):
            losses = [measure.token_losses(*each) for each in zip(logits, windows, strict=True)]
            assert perplexity == measure.perplexity(losses)


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (2, 9, 7)).astype(np.float32)
    windows = np.zeros((2, 9), np.int64)
    figures = [measure.token_figures(each, each, window) for each, window in zip(logits, windows, strict=True)]
    found = measure.compare_with_dense(figures)[2]
    assert (found.mean_kl, found.kl_999, found.loss_difference, found.same_top, found.tokens) == (0, 0, 0, 1, 16)


def _retype_gguf(export: Path) -> None:
    """q8_0 to a type of another size of block: the file keeps its length."""
    file = export / "model.gguf"
    data = bytearray(file.read_bytes())
    name = b"blk.1.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 16
    data[at : at + 4] = (9).to_bytes(4, "little") if data[at] == 8 else (30).to_bytes(4, "little")
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("target", "damage", "message"),
    [
        ("gguf", rename_gguf, "blk.1.attn_q.weight is missing"),
        ("gguf", _retype_gguf, "blk.1.attn_q.weight|damaged"),
        ("onnx", partial(transpose_onnx, name="layers.1.attn.q_proj"), "is there for model.layers.1.self_attn.q_proj"),
    ],
)
def test_structure_finds_what_size_does_not(
    exported: MakeExport, tmp_path: Path, target: str, damage: object, message: str
) -> None:
    made = exported(target)
    copy = tmp_path / target
    shutil.copytree(made.export, copy)
    assert callable(damage)
    damage(copy)
    (structure, failures) = check_structure(export_format(target), copy, Bundle.open(made.bundle))
    assert failures
    assert re.search(message, failures[0])
    assert structure is not None
    assert structure.found < max(structure.tensors, 1)


def test_a_bundle_that_changed_is_refused(exported: MakeExport, tmp_path: Path) -> None:
    made = exported("gguf")
    shutil.copytree(made.bundle, tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        verify_export(made.export, Bundle.open(tmp_path / "b", verify_hash=True))


def test_the_bundle_of_another_plan_is_refused(exported: MakeExport) -> None:
    with pytest.raises(BundleError, match="another plan"):
        verify_export(exported("gguf").export, Bundle.open(exported("onnx").bundle))


def test_a_process_above_its_budget_fails(exported: MakeExport, tmp_path: Path) -> None:
    """A plan that claims that the runtime takes nothing, and sets its budget by that."""
    made = exported("gguf")
    breakdown = {**made.plan.breakdown, "runtime_library": 0, "runtime_tokenizer": 0}
    lying: Plan = dataclasses.replace(made.plan, breakdown=breakdown, anonymous={}, budget_scope="process")
    for name in ("b", "e"):
        shutil.copytree(made.bundle if name == "b" else made.export, tmp_path / name)
        save_plan(lying, tmp_path / name / "plan.json", force=True)
    report = verify_export(tmp_path / "e", Bundle.open(tmp_path / "b"))
    assert not report.passed
    assert report.runtimes[0].memory is not None
    assert report.runtimes[0].memory.within_budget is False
    assert "its process took" in report.failures[0]
    assert "the budget of 3.00 MB (process) does not hold" in report.failures[0]


def test_without_the_dense_model_there_is_no_divergence(exported: MakeExport, text: Path, tmp_path: Path) -> None:
    made = exported("gguf")
    report = pipeline.verify_directory(made.export, str(tmp_path), None, made.bundle, text)
    assert report.passed
    assert report.dense_perplexity is None
    assert report.runtimes[0].divergence is None
    assert report.runtimes[0].perplexity is not None
    assert any("dense model" in note for note in report.notes)


def test_load_time_is_checked_end_to_end(
    verified: tuple[Made, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``max_load_time_ratio`` on a report that verify wrote, and on one in which loading takes longer."""
    from acip_export.check.run import run_check, update_lock

    made, _ = verified
    shutil.copytree(made.export, tmp_path / "e")
    (tmp_path / "acip-check.toml").write_text('[[check]]\nname = "e"\npath = "e"\nmax_load_time_ratio = 2.0\n')
    monkeypatch.chdir(tmp_path)
    config = load_config(tmp_path / "acip-check.toml")
    assert update_lock(config).passed
    assert run_check(config).passed
    data = json.loads((tmp_path / "e" / "report.json").read_text())
    data["runtimes"][0]["load_seconds"] = 2.5 * data["runtimes"][0]["load_seconds"] + 0.5
    (tmp_path / "e" / "report.json").write_text(json.dumps(data))
    outcome = run_check(config)
    assert [problem.rule for problem in outcome.results[0].problems] == ["max_load_time_ratio"]
