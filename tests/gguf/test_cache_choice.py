"""``--cache-type auto``: measured in llama.cpp, and the best pair of cache and weights under the budget."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

import acip_export
from acip_export.api import open_scores, plan_export
from acip_export.api.cache_types import known_cache_losses, measured_cache_losses
from acip_export.artifacts.cache_losses import cache_file
from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import DoesNotFit, PlanRequest, Problem, resolve
from acip_export.progress import Progress
from converters.gguf.memory import CACHE_TYPES
from tests.ranking.support import calibration_text
from tests.support import Run, make_model, make_scores

TYPES = ("q8_0", "q4_0")
SAMPLE = Path(__file__).parents[2] / "samples" / "llama"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained sample, which the cache of measured losses is written beside."""
    model = Path(shutil.copytree(SAMPLE, tmp_path_factory.mktemp("sample") / "llama"))
    text = calibration_text(model.parent / "text.txt")
    acip_export.rank(model, text, out=model / "m.acip", algorithm="magnitude", context=128)
    return model


@pytest.mark.slow
def test_the_best_pair_under_each_budget(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    scores = open_scores(checkpoint, None)
    longest = checkpoint.shape.max_context
    request = PlanRequest("gguf", 10**7, context=longest, prompt_batch=16, cache_type="auto", types=TYPES)
    question = resolve(request, checkpoint)
    reports: list[Progress] = []
    losses = measured_cache_losses(checkpoint, scores, question.space, tuple(CACHE_TYPES), reports.append)
    assert next(each for each in reports if each.stage == "KV cache types").eta_seconds is not None
    # What was measured: nothing for what rounds nothing, more for fewer bits, and it is kept.
    for side in (losses.keys, losses.values):
        assert set(side) == set(CACHE_TYPES)
        assert side["f16"] == 0 and side["f32"] < 1e-7
        assert 0 < side["q8_0"] < side["q5_0"] < side["q4_0"] < 1
    assert scores.file is not None and cache_file(scores.file, "gguf").is_file()
    assert known_cache_losses(scores, question.space) == losses
    reports.clear()
    assert measured_cache_losses(checkpoint, scores, question.space, tuple(CACHE_TYPES), reports.append) == losses
    assert not reports

    problem = Problem.of(checkpoint, scores, question.space, cache_losses=losses)
    floor = problem.floor(
        "memory", replace(question.rule, cache_type_k="q4_0", cache_type_v="q4_0").at_every_budget(16)
    )
    chosen = []
    for more in (0, 200_000, 10**7):
        asked = replace(request, budget_bytes=floor.nbytes + more)
        plan = plan_export(checkpoint, scores, asked)
        assert plan.used_bytes <= floor.nbytes + more
        chosen.append(plan.serving.cache_types)
        # No pair, tried one by one, is predicted to lose less.
        for keys, values in question.caches:
            rule = replace(question.rule, cache_type_k=keys, cache_type_v=values)
            budget = resolve(asked, checkpoint).budget
            try:
                other = problem.plan(budget, rule.serving(budget, problem.memory), exact=False)
            except DoesNotFit:
                continue
            assert plan.predicted_loss <= other.predicted_loss + 1e-3
    assert chosen[0] != chosen[-1] and "q" not in chosen[-1]
    # Losses are those of weights and cache: of an f16 cache none.
    fixed = plan_export(checkpoint, scores, replace(asked, cache_type="q4_0"))
    assert fixed.predicted_loss >= losses.keys["q4_0"] + losses.values["q4_0"]
    assert not any("leaves out" in note for note in fixed.notes)


@pytest.mark.slow
def test_a_sweep_has_the_best_of_weights_and_cache_at_every_context(model: Path, run: Run) -> None:
    asked = ("plan", "--sweep", "--json", "--format", "gguf", "--layout", "stock", "--types", ",".join(TYPES))
    asked = (*asked, "-m", model, "--scores", model / "m.acip")
    contexts = ("64", "256", "512")
    done = run(*asked, "--context", ";".join(contexts), "--cache-type", "auto")
    assert done.code == 0, done.err
    lines = json.loads(done.out)["lines"]
    assert [line["context"] for line in lines] == [64, 256, 512]
    assert [line["label"].rpartition(", ")[2] for line in lines] == ["64 tokens", "256 tokens", "512 tokens"]
    for line in lines:
        assert line["points"][-1]["cache_type_k"].startswith(("f", "bf"))  # where there is room for everything
    for keys in ("f16", "q4_0"):
        fixed = json.loads(run(*asked, "--context", ";".join(contexts), "--cache-type", keys).out)["lines"]
        for best, other in zip(lines, fixed, strict=True):
            # None of one cache alone, at the bytes of a plan or less, is predicted to lose less.
            for point in best["points"]:
                within = [p["predicted_loss"] for p in other["points"] if p["used_bytes"] <= point["used_bytes"]]
                assert point["predicted_loss"] <= min(within, default=inf) + 1e-3
    smallest, largest = lines[2]["points"][0], lines[2]["points"][-1]
    assert smallest["cache_type_k"] != largest["cache_type_k"]


@pytest.mark.usefixtures("kept_at_once")
def test_measuring_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(tmp_path / "m", hidden_size=128, head_dim=32, num_attention_heads=4)
    text = calibration_text(tmp_path / "text.txt")
    acip_export.rank(model, text, out=model / "m.acip", algorithm="magnitude", context=128)
    checkpoint = Checkpoint.open(model)
    scores = open_scores(checkpoint, None)
    space = resolve(PlanRequest("gguf", 10**7, types=TYPES), checkpoint).space
    steps: list[int] = []

    def measure(types: tuple[str, ...], stop: int | None = None) -> object:
        steps.clear()

        def advance(step: Progress) -> None:
            if step.stage == "KV cache types":
                steps.append(step.done)
                if step.done == stop:
                    raise KeyboardInterrupt

        return measured_cache_losses(checkpoint, scores, space, types, advance)

    asked = ("f16", "q8_0", "q4_0")
    whole, count = measure(asked), len(steps)
    assert count >= 8
    cache = cache_file(model / "m.acip", "gguf")
    cache.unlink()
    left = cache.with_name(f"{cache.name}.run")
    for stop in (3, count - 1):  # among the types of the first window, and behind it
        with pytest.raises(KeyboardInterrupt):
            measure(asked, stop)
        assert left.exists() and not cache.exists()
    assert "going on behind type 3" in caplog.text
    unfinished = left.read_bytes()
    assert measure(asked) == whole and steps == [count]
    assert not left.exists()
    # Of other types it says nothing.
    cache.unlink()
    left.write_bytes(unfinished)
    measure(("f16", "q8_0"))
    assert len(steps) == count // 2


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", hidden_size=128, head_dim=32, num_attention_heads=4)
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    request = PlanRequest("gguf", 10**7, context=256, cache_type_v="q4_0")
    assert any(
        "leaves out what a KV cache of f16 (K), q4_0 (V)" in note
        for note in plan_export(checkpoint, scores, request).notes
    )
    with pytest.raises(UnsupportedError, match=r"measures what each type costs: .* name a type"):
        plan_export(checkpoint, scores, replace(request, cache_type_v=None, cache_type="auto"))
