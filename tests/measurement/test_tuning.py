"""Tuning descends the divergence of the export from the dense model, and goes on where it was stopped."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from acip_export.artifacts.materialized import stored_of
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.artifacts.tuned import Tuned
from acip_export.formats.registry import export_format
from acip_export.io.scratch import Scratch
from acip_export.materialization.factors import Pair
from acip_export.materialization.rounded_weights import RoundedWeights
from acip_export.measurement import tuning
from acip_export.measurement.block_passes import BlockPasses
from acip_export.measurement.pair_descent import PairDescent
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Progress, silent
from acip_export.ranking.load import load_model
from tests.support import dense, everywhere, make_model, make_plan, make_scores

TEXT = torch.randint(512, (12, 64), generator=torch.Generator().manual_seed(1))
TYPES = {"gguf": "q4_0", "onnx": "uint4"}
# Every linear layer a pair, in both formats.
PAIRS = {"gguf-pairs": "q8_0", "onnx-pairs": "int8"}


@pytest.fixture(params=[*TYPES, *PAIRS])
def plan(request: pytest.FixtureRequest, model: Path) -> Plan:
    name, _, pairs = request.param.partition("-")
    if not pairs:
        return make_plan(model, name, export_format(name).layouts[0].name, dense(type=TYPES[name]))
    type = PAIRS[request.param]
    fields = {"representation": "factored", "rank": 32, "up_type": type, "down_type": type}
    return make_plan(model, name, "factored", everywhere(**fields, embedding_type=TYPES[name]))


@pytest.fixture
def tuned(model: Path, scores: ScoreFile, plan: Plan) -> Callable[..., Tuned]:
    checkpoint, written_as = Checkpoint.open(model), export_format(plan.format)

    def tune(seconds: float, state: Path | None = None, progress: Callable[[Progress], None] = silent) -> Tuned:
        weights = RoundedWeights(checkpoint, scores, written_as.round_trip, written_as.feedback_types)
        return tuning.tune(
            checkpoint, weights, plan, written_as.tunable_types, TEXT, TEXT[:4], seconds, state, progress
        )

    return tune


def test_gradients_are_those_of_the_whole_model(
    model: Path, scores: ScoreFile, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_factors: dict[str, Tensor] = {}

    def note(_: PairDescent, key: str, __: Tensor, gradient: Tensor, *___: object) -> None:
        of_factors[key] = gradient

    monkeypatch.setattr(PairDescent, "_move", note)
    checkpoint, written_as = Checkpoint.open(model), export_format(plan.format)
    weights = RoundedWeights(checkpoint, scores, written_as.round_trip, written_as.feedback_types)
    whole = load_model(checkpoint, torch.device("cpu"))
    passes = BlockPasses(checkpoint, TEXT)
    student = tuning._Student(passes, weights.of(plan, inputs=False), written_as.tunable_types, Scratch())
    run = tuning._Run(passes, student, TEXT[:4], checkpoint.shape.vocabulary, "", None)
    with torch.no_grad():
        for move in student.moves.values():
            move.add_(0.05 * torch.randn(move.shape, generator=torch.Generator().manual_seed(0)))
    before = {name: move.detach().clone() for name, move in student.moves.items()}
    loss = run._descend()
    found = {name: move.grad for name, move in student.moves.items()}

    moves = {name: move.requires_grad_() for name, move in before.items()}
    student.moves = moves
    names = [name for group in passes.model.parameters.values() for name in group]
    tensors: dict[str, Tensor] = student.tensors(names)
    for name, factors in student.pairs.waiting.items():
        moves |= {f"up of {name}": factors[0], f"down of {name}": factors[1]}
    found |= of_factors
    expected = whole(TEXT[:4]).logits.log_softmax(-1)
    logits = functional_call(whole, tensors, (TEXT[:4],)).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - logits)).sum() / TEXT[:4].numel()
    gradients = torch.autograd.grad(divergence, list(moves.values()))

    assert loss == pytest.approx(float(divergence.detach()), rel=1e-4)
    assert any("norm" in name for name in moves), "norms are tuned"
    assert any("embed" in name for name in moves), "and the embedding"
    for name, gradient in zip(moves, gradients, strict=True):
        got = found[name]
        assert got is not None
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_the_export_comes_nearer_to_the_dense_model(tuned: Callable[..., Tuned], plan: Plan) -> None:
    found = tuned(2.0)
    assert found.result.steps >= tuning._LEAST_STEPS
    assert found.result.after < found.result.before
    assert found.result.kept
    matrices = {decision.name for decision in plan.tensors if len(decision.shape) == 2}
    pairs = {decision for decision in plan.tensors if decision.rank is not None}
    assert found.gains.keys() == matrices - {decision.name for decision in pairs}
    assert found.vectors.keys() == {decision.name for decision in plan.tensors} - matrices
    assert {name: tuple(factor.shape) for name, factor in found.factors.items()} == {
        name: shape for decision in pairs for name, shape in stored_of(decision).items()
    }
    assert all(0.8 < float(gains.min()) <= float(gains.max()) < 1.25 for gains in found.gains.values())


def test_what_does_not_help_is_left_out(tuned: Callable[..., Tuned], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "LEARNING_RATE", 1.0)
    monkeypatch.setattr(tuning, "PAIR_RATE", 100.0)
    found = tuned(0.5)
    assert found.result.after > found.result.before
    assert not found.gains
    assert not found.vectors
    assert not found.factors


def test_products_of_bfloat16_come_nearer_too_and_hold_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors that have them; here they may be emulated."""
    monkeypatch.setattr(tuning, "fast_bfloat16", lambda: True)
    model = make_model(tmp_path / "m", dtype=torch.bfloat16)
    fields = {"representation": "factored", "rank": 32, "up_type": "int8", "down_type": "int8"}
    plan = make_plan(model, "onnx", "factored", everywhere(**fields, embedding_type="int8"))
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    product = PairDescent.product

    def counted(self: PairDescent, name: str) -> Tensor:
        nonlocal most
        found = product(self, name)
        alive.update(self.waiting.get(name, ()))
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(PairDescent, "product", counted)
    checkpoint, written_as = Checkpoint.open(model), export_format("onnx")
    made = make_scores(model)
    weights = RoundedWeights(checkpoint, made, written_as.round_trip, written_as.feedback_types)
    found = tuning.tune(checkpoint, weights, plan, written_as.tunable_types, TEXT, TEXT[:4], 2.0)
    assert found.result.kept
    assert most <= 14, "the factors of one block's seven pairs"


def test_a_pair_of_zeros_stays() -> None:
    pairs = PairDescent(Scratch())
    pairs.add("zeros", Pair(torch.zeros(4, 2), torch.zeros(2, 3)))
    pairs.product("zeros").sum().backward()
    pairs.step(1, 1e-3)
    assert not pairs.product("zeros").any()


class Stopped(Exception):  # noqa: N818 - as a signal would
    pass


def test_a_run_that_was_stopped_goes_on(
    tuned: Callable[..., Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_SAVE_SECONDS", -1.0)  # after every step
    monkeypatch.setattr(tuning, "_TIMES_SAVING", 0.0)
    monkeypatch.setattr(tuning, "_LEAST_STEPS", 8)  # and a second that is too short for more
    state = tmp_path / "tuning.safetensors"
    whole = tuned(1e-3)

    def stop(progress: Progress) -> None:
        if progress.stage == tuning._STAGE and progress.done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        tuned(1e-3, state, stop)
    steps: list[int] = []
    rest = tuned(1e-3, state, lambda progress: steps.append(progress.done) if progress.stage == tuning._STAGE else None)
    assert steps[0] == 5, "the step that was not saved is made again, none of those before it"
    assert rest.result.steps == whole.result.steps == 8
    for name, gains in whole.gains.items():
        assert torch.equal(gains, rest.gains[name])
    for name, vector in whole.vectors.items():
        assert torch.equal(vector, rest.vectors[name])
    for name, factor in whole.factors.items():
        assert torch.equal(factor, rest.factors[name])


def test_a_damaged_state_is_no_obstacle(tuned: Callable[..., Tuned], tmp_path: Path) -> None:
    state = tmp_path / "tuning.safetensors"
    state.write_bytes(b"\x00" * 100)
    assert tuned(0.1, state).result.steps >= tuning._LEAST_STEPS
