"""Tokens per second of plans, from a table of what a machine does in a second."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from acip_export.artifacts.plan import Plan, Serving
from acip_export.artifacts.scores import ScoreFile
from acip_export.artifacts.speeds import (
    CacheSpeed,
    LayerSpeed,
    MatrixSpeed,
    RuntimeSpeed,
    SpeedTable,
    load_speeds,
    save_speeds,
)
from acip_export.errors import DeviceFileError, UnreachableSpeedError, UsageError
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import Budget, PlanRequest, check_pace, make_plan, resolve
from acip_export.planning.problem import Problem
from acip_export.planning.speed import Pace, Predictor, Product
from tests.planning.problems import with_overhead
from tests.support import make_model, make_scores

TYPES = ("f16", "q8_0", "q6_k", "q4_k", "q4_0")
# A slow memory, so that what is read decides.
TABLE = RuntimeSpeed(
    version="made up",
    matrices={name: (MatrixSpeed(10**6, 2e7 if name == "q4_0" else 1e7, 1e9),) for name in TYPES},
    token_seconds=0.001,
    layers=(LayerSpeed(10**6, 0.0005),),
    width_seconds=1e-9,
    cache_read=1e8,
    attention=1e10,
    head_share=0.0,
)
REQUEST = PlanRequest("gguf", 3_000_000, types=TYPES, context=128, speeds={"llama.cpp": TABLE})


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ScoreFile]:
    model = make_model(tmp_path_factory.mktemp("models") / "tiny")
    return Checkpoint.open(model), make_scores(model)


def planned(ranked: tuple[Checkpoint, ScoreFile], request: PlanRequest) -> tuple[Problem, Budget, Plan]:
    question = resolve(request, ranked[0])
    problem = Problem.of(*ranked, with_overhead(question.space))
    return problem, question.budget, make_plan(problem, question.budget, question.rule, question.pace)


def test_by_hand(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    problem, _, plan = planned(ranked, REQUEST)
    shape = ranked[0].shape
    matrices = [d for d in plan.tensors if len(d.shape) == 2]  # the embedding is tied: the head reads it
    assert shape.tied_embeddings and all(d.rank is None for d in matrices)
    read = sum(d.nbytes / (2e7 if d.type == "q4_0" else 1e7) for d in matrices)
    cache = problem.memory.serving(plan.serving).kv_cache
    fixed = 0.001 + shape.layers * 0.0005
    assert plan.speed.runtime == "llama.cpp"
    assert plan.speed.answer == pytest.approx(1 / (fixed + read + cache / 1e8))
    in_layers = [d for d in matrices if "layers" in d.name]
    seconds = sum(2 * d.shape[0] * d.shape[1] / 1e9 for d in in_layers)
    seconds += 2 * shape.heads * shape.head_dim * 128 * shape.layers / 1e10 + fixed / plan.serving.prompt_batch
    seconds += shape.layers * shape.hidden * 1e-9
    assert plan.speed.prompt == pytest.approx(1 / seconds)


def test_speeds_between_models_of_two_sizes(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    """A model in the processor's cache is read faster than one in memory; between them, by the logarithm of bytes."""
    sizes = (MatrixSpeed(16 * 10**6, 1e9, 4e9), MatrixSpeed(10**6, 4e9, 1e9))
    table = replace(TABLE, matrices=dict.fromkeys(TYPES, sizes))
    for nbytes, read, compute in ((4 * 10**6, 2e9, 2e9), (10**5, 4e9, 1e9), (10**9, 1e9, 4e9), (0, 4e9, 1e9)):
        found = table.matrix("q8_0", nbytes)
        assert (found.read, found.compute) == (pytest.approx(read), pytest.approx(compute))
    layers = replace(TABLE, layers=(LayerSpeed(16 * 10**6, 0.003), LayerSpeed(10**6, 0.001)))
    assert [layers.layer_seconds(n) for n in (0, 10**6, 4 * 10**6, 10**9)] == pytest.approx(
        [0.001, 0.001, 0.002, 0.003]
    )
    plan = planned(ranked, replace(REQUEST, speeds={"llama.cpp": table}))[2]
    matrices = [d for d in plan.tensors if len(d.shape) == 2]
    nbytes = sum(d.nbytes for d in matrices)
    assert 10**6 < nbytes < 16 * 10**6
    flat = replace(TABLE, matrices=dict.fromkeys(TYPES, (table.matrix("q8_0", nbytes),)))
    assert plan.speed == planned(ranked, replace(REQUEST, speeds={"llama.cpp": flat}))[2].speed


def test_caches_of_other_types_have_speeds_of_their_own(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    """Keys and values each by their bytes; of a type that was not measured, as of the format's own."""
    q8, q4 = CacheSpeed(4e7, 5e9), CacheSpeed(2e7, 2e9)
    table = replace(TABLE, caches={"q8_0": q8, "q4_0": q4})
    shape, format = ranked[0].shape, export_format("gguf")
    numbers = shape.layers * 256 * shape.kv_heads * shape.head_dim
    operations = shape.heads * shape.head_dim * 128 * shape.layers
    bytes_of = {"f16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32, "q5_0": 22 / 32}
    own = CacheSpeed(TABLE.cache_read, TABLE.attention)
    for keys, values in (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("f16", "q4_0"), ("q5_0", "q5_0")):
        serving = Serving(128, keys, 32, cache_type_v=values)
        predictor = Predictor(format, shape, "llama.cpp", table, serving)
        speeds = [(each, table.caches.get(each, own)) for each in (keys, values)]
        expected = sum(numbers * bytes_of[each] / speed.read for each, speed in speeds)
        assert predictor.cache_seconds == pytest.approx(expected)
        assert predictor.attention_seconds == pytest.approx(sum(operations / speed.attention for _, speed in speeds))


def test_tables_without_caches_are_read(tmp_path: Path) -> None:
    """Where only the own type was measured."""
    table = SpeedTable("here", 2, {"llama.cpp": replace(TABLE, caches={"q8_0": CacheSpeed(4e7, 5e9)})})
    save_speeds(table, tmp_path / "new.json")
    assert load_speeds(tmp_path / "new.json") == table
    old = json.loads((tmp_path / "new.json").read_text())
    del old["runtimes"]["llama.cpp"]["caches"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert load_speeds(tmp_path / "old.json").runtimes == {"llama.cpp": TABLE}


def test_tables_without_a_size_or_of_another_version_are_refused(tmp_path: Path) -> None:
    save_speeds(SpeedTable("here", 2, {"llama.cpp": TABLE}), file := tmp_path / "speeds.json")
    document = json.loads(file.read_text())
    for changed, says in (
        ({"version": 1}, "acip-export calibrate"),
        ({"runtimes": {"llama.cpp": document["runtimes"]["llama.cpp"] | {"matrices": {"q8_0": []}}}}, "matrices"),
    ):
        file.write_text(json.dumps(document | changed))
        with pytest.raises(DeviceFileError, match=says):
            load_speeds(file)


def test_a_speed_that_must_be_reached(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    _, _, free = planned(ranked, REQUEST)
    speeds, losses = [], []
    for least in (1.1, 1.5, 2.0):
        least *= free.speed.answer
        _, budget, plan = planned(ranked, replace(REQUEST, min_speed=least))
        assert plan.speed.answer >= least
        assert plan.used_bytes + plan.certificate.bytes_left == plan.budget_bytes == budget.nbytes
        assert plan.certificate.lower_bound <= plan.predicted_loss
        assert any("--min-speed" in note for note in plan.notes)
        speeds.append(plan.speed.answer)
        losses.append(plan.predicted_loss)
    assert losses == sorted(losses) and losses[0] >= free.predicted_loss
    # One that is reached anyway changes nothing.
    _, _, same = planned(ranked, replace(REQUEST, min_speed=free.speed.answer * 0.99))
    assert same == free


def test_one_that_no_plan_reaches(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    with pytest.raises(UnreachableSpeedError, match="the fastest is predicted with") as refused:
        planned(ranked, replace(REQUEST, min_speed=1e4))
    assert refused.value.exit_code == 4
    fastest = refused.value.fastest
    assert fastest is not None and "--min-speed" in str(refused.value)
    _, _, plan = planned(ranked, replace(REQUEST, min_speed=fastest * 0.99))
    assert {d.type for d in plan.tensors if len(d.shape) == 2} == {"q4_0"}
    problem, budget, _ = planned(ranked, REQUEST)
    with pytest.raises(UnreachableSpeedError):
        check_pace(problem, budget, plan.serving, Pace("llama.cpp", TABLE, 1e4))
    check_pace(problem, budget, plan.serving, Pace("llama.cpp", TABLE, fastest * 0.99))
    slow_cache = replace(TABLE, cache_read=1e6)
    with pytest.raises(UnreachableSpeedError, match="shorter  --context"):
        planned(ranked, replace(REQUEST, min_speed=1e4, speeds={"llama.cpp": slow_cache}))


def test_the_fastest_types_are_those_of_the_plan_that_has_them(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    """In the smallest plan q8_0 would be faster than q4_0, but with it the plan is none that caches hold."""
    smallest = planned(ranked, replace(REQUEST, types=("q4_0",)))[2].planned_bytes
    q8_0 = (MatrixSpeed(smallest, 1e8, 1e9), MatrixSpeed(2 * smallest - smallest // 4, 1e7, 1e9))
    table = replace(TABLE, matrices={"q4_0": (MatrixSpeed(10**6, 2e7, 1e9),), "q8_0": q8_0})
    request = replace(REQUEST, types=("q8_0", "q4_0"), speeds={"llama.cpp": table})
    speed = planned(ranked, replace(request, types=("q4_0",)))[2].speed
    assert speed is not None and speed.answer > planned(ranked, replace(request, types=("q8_0",)))[2].speed.answer
    plan = planned(ranked, replace(request, min_speed=0.99 * speed.answer))[2]
    assert plan.speed.answer >= 0.99 * speed.answer


def test_errors_grow_with_what_was_not_timed(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    """By the root of the size of models that are smaller, and by what layers take where that is not known."""
    known = replace(TABLE, prompt_error=0.2, answer_error=0.5)
    problem, _, plan = planned(ranked, replace(REQUEST, speeds={"llama.cpp": known}))
    assert (plan.speed.prompt_error, plan.speed.answer_error) == pytest.approx((0.2, 0.5))
    predictor = Predictor.of(problem, Pace("llama.cpp", known), plan.serving)
    weights = sum(m.weights for d in plan.tensors for m in predictor.products(d) if not m.head)
    smaller = planned(ranked, replace(REQUEST, speeds={"llama.cpp": replace(known, smallest=4 * weights)}))[2].speed
    assert (smaller.prompt_error, smaller.answer_error) == pytest.approx((1.2 * 2 - 1, 1.5 * 2 - 1))
    unknown = planned(ranked, replace(REQUEST, speeds={"llama.cpp": replace(known, layer_error=2.0)}))[2].speed
    share = (0.001 + ranked[0].shape.layers * 0.0005) * unknown.answer
    assert unknown.prompt_error == pytest.approx(0.2)
    assert unknown.answer_error == pytest.approx(1.5 * max(1 + 2 * share, 1 / (1 - share)) - 1)
    assert planned(ranked, REQUEST)[2].speed.answer_error is None


def test_types_that_were_not_measured(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    partial = replace(TABLE, matrices={"q4_0": TABLE.matrices["q4_0"]})
    speeds = {"llama.cpp": partial}
    assert planned(ranked, replace(REQUEST, speeds=speeds))[2].speed is None
    # Asked for a speed, a plan consists of what is known.
    plan = planned(ranked, replace(REQUEST, speeds=speeds, min_speed=1))[2]
    assert {d.type for d in plan.tensors if len(d.shape) == 2} == {"q4_0"}
    nothing = replace(TABLE, matrices={})
    with pytest.raises(UnreachableSpeedError, match="were not measured"):
        planned(ranked, replace(REQUEST, speeds={"llama.cpp": nothing}, min_speed=1))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"speeds": {}}, "acip-export calibrate"),
        ({"speeds": {"onnxruntime": TABLE}}, "of this machine with llama.cpp"),
        ({"speeds": {}, "device": "steam-deck-16gb"}, "of steam-deck-16gb"),
        ({"min_speed": 0.0}, "more than 0"),
        ({"min_speed": float("nan")}, "more than 0"),
        ({"min_speed": float("inf")}, "more than 0"),
        ({"candidates": 3}, "--candidates"),
    ],
)
def test_what_is_refused_before_anything_is_planned(
    ranked: tuple[Checkpoint, ScoreFile], changed: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        resolve(replace(REQUEST, **{"min_speed": 5.0, **changed}), ranked[0])


def test_pairs_are_two_matrices(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    problem, _, plan = planned(ranked, REQUEST)
    predictor = Predictor.of(problem, Pace("llama.cpp", TABLE), plan.serving)
    name, shape = "model.layers.0.mlp.up_proj.weight", (512, 256)
    dense = next(d for d in plan.tensors if d.name == name)
    pair = replace(
        dense, representation="factored", type=None, rank=64, up_type="q4_0", down_type="q8_0", kept=((0, 64),)
    )
    assert list(predictor.products(pair)) == [
        Product("q8_0", 64 * 256 // 32 * 34, 64 * 256, head=False),
        Product("q4_0", 512 * 64 // 32 * 18, 512 * 64, head=False),
    ]
    assert dense.shape == shape


@pytest.mark.parametrize("runtime", [None, "onnxruntime"])
def test_the_speed_of_an_onnx_plan_is_that_of_what_people_talk_to(
    ranked: tuple[Checkpoint, ScoreFile], runtime: str | None
) -> None:
    """onnxruntime-genai, where it was measured; a device that names onnxruntime means both."""
    slower = replace(TABLE, token_seconds=2 * TABLE.token_seconds)
    speeds = {"onnxruntime": TABLE, "onnxruntime-genai": slower}
    pace = resolve(PlanRequest("onnx", 3_000_000, runtime=runtime, speeds=speeds), ranked[0]).pace
    assert pace == Pace("onnxruntime-genai", slower)
    del speeds["onnxruntime-genai"]
    pace = resolve(PlanRequest("onnx", 3_000_000, runtime=runtime, speeds=speeds), ranked[0]).pace
    assert pace == Pace("onnxruntime", TABLE)
    unknown = PlanRequest("onnx", 3_000_000, runtime=runtime, min_speed=1.0)
    with pytest.raises(UsageError, match="of this machine with onnxruntime-genai"):
        resolve(unknown, ranked[0])
