"""Where low rank pays: plans of equal bytes with and without factor pairs, from 1.5 to 4 bits a weight.

    python -m benchmarks.low_rank --format onnx --types int8-b128,int4,int4-b256,int2,int2-b128 --scores FILE ...

Plans for the model of ``make real-model`` at the same bytes of files: types alone, and with the factor pairs that each
score file has (one without training and a learned one, say). All have the types' default unless named. Each runs in
PyTorch from its rounded weights, on text that the ranking held out. Adds to benchmarks/low_rank.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import torch

from acip_export.api.calibration import rounded_weights
from acip_export.api.opening import open_scores
from acip_export.api.plan import planning_problem, possible_with
from acip_export.api.rounding_errors import settle_rounding
from acip_export.api.text import held_out_text
from acip_export.artifacts.plan import Plan
from acip_export.cli import output as console
from acip_export.errors import AcipError
from acip_export.measurement.plans import measure_plans
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import Budget, DoesNotFit, PlanRequest, resolve
from benchmarks.kept_rows import add_rows
from samples import real

RESULTS = Path(__file__).with_suffix(".json")
BITS = (1.5, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0)


@dataclass(frozen=True)
class Point:
    """What a plan loses at some bytes; ``kl`` is empty where no plan fits or it does not run.

    Attributes:
        bits: of the files, by weight of the dense model. ranking: the algorithm's name.
        pairs: matrices that are factor pairs, of ``matrices``. predicted, kl, error: divergence from the dense model,
            nats per token.
        tokens: of held-out text, that ``kl`` was measured on.
    """

    format: str
    layout: str
    types: str
    bits: float
    nbytes: int
    ranking: str
    with_pairs: bool
    pairs: int = 0
    matrices: int = 0
    adapters: bool = False
    predicted: float | None = None
    kl: float | None = None
    error: float | None = None
    reason: str = ""
    tokens: int = 0


def points(args: argparse.Namespace, scores_file: Path, model: Path) -> list[Point]:
    """Plan at every size, with pairs and without, and run all of the plans side by side."""
    checkpoint = Checkpoint.open(model)
    scores = open_scores(checkpoint, scores_file)
    request = PlanRequest(
        args.format,
        budget_scope="file",
        layout=args.layout,
        types=tuple(filter(None, args.types.split(","))),
        calibrate=True,
    )
    request, _ = settle_rounding(scores, request)
    question, _ = possible_with(scores, resolve(request, checkpoint))
    problem = planning_problem(checkpoint, scores, question)
    alone = problem.only(lambda _, decision: decision.representation == "dense")
    weights_of_model = sum(prod(info.shape) for info in checkpoint.tensors.values())
    algorithm = str(dict(scores.algorithm).get("name"))
    found: list[tuple[Point, Plan | None]] = []
    for bits in args.bits:
        nbytes = int(weights_of_model * bits / 8)
        for with_pairs, each in ((False, alone), (True, problem)):
            point = Point(args.format, args.layout, args.types, bits, nbytes, algorithm, with_pairs, tokens=args.tokens)
            budget = Budget(nbytes, "file")
            try:
                plan = each.plan(budget, question.rule.serving(budget, each.memory))
            except DoesNotFit as reason:
                found.append((replace(point, reason=f"at least {reason.floor.nbytes} bytes"), None))
                continue
            matrices = [decision for decision in plan.tensors if len(decision.shape) == 2]
            pairs = sum(decision.representation != "dense" for decision in matrices)
            point = replace(point, pairs=pairs, matrices=len(matrices), adapters=plan.adapters)
            found.append((replace(point, predicted=plan.predicted_divergence), plan))
    text = held_out_text(checkpoint, scores, 512)
    if text is None:
        raise SystemExit("the text that the ranking held out is not here")
    windows = torch.from_numpy(text.windows)[-max(1, args.tokens // text.windows.shape[1]) :]
    for point, _ in found:
        print(point, flush=True)
    plans = [plan for _, plan in found if plan is not None]
    weights = rounded_weights(checkpoint, scores, problem.space)
    with console.stage_progress() as progress:
        results = iter(measure_plans(checkpoint, weights, plans, windows, progress))
    done = []
    for point, has_plan in found:
        result = None if has_plan is None else next(results)
        if isinstance(result, AcipError):
            point = replace(point, reason=str(result))
        elif result is not None:
            point = replace(point, kl=result.kl, error=result.error)
        done.append(point)
        print(point, flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="onnx")
    parser.add_argument("--layout", default="factored")
    parser.add_argument("--types", default="", help="by comma; default: the format's")
    parser.add_argument("--scores", type=Path, nargs="+", required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=BITS)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    model = real.cached().model
    for file in args.scores:
        new = [asdict(point) for point in points(args, file, model)]
        keys = ("format", "layout", "types", "ranking", "with_pairs", "bits")
        add_rows(RESULTS, "points", new, keys)


if __name__ == "__main__":
    main()
