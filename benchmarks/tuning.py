"""What tuning makes of plans: their divergence from the dense model before and after, on held-out text.

    python -m benchmarks.tuning --format onnx --bytes 53301571 --minutes 20 --scores FILE

Plans for the model of ``make real-model`` in so many bytes of files, with factor pairs where they pay, tuned for so
long; nothing is written but benchmarks/tuning.json. Both figures are of rounded weights in PyTorch.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from acip_export.api.opening import open_scores
from acip_export.api.plan import plan_export
from acip_export.api.tuning import tuned_numbers
from acip_export.cli import output as console
from acip_export.measurement.tuning import PAIR_RATE
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from benchmarks.kept_rows import add_rows
from samples import real

RESULTS = Path(__file__).with_suffix(".json")


def tuned(args: argparse.Namespace, scores_file: Path) -> dict[str, Any]:
    """Plan, tune, and return the figures."""
    checkpoint = Checkpoint.open(real.cached().model)
    scores = open_scores(checkpoint, scores_file)
    seconds = 60 * args.minutes
    request = PlanRequest(
        args.format, args.bytes, "file", layout=args.layout, types=args.types, calibrate=True, tune_seconds=seconds
    )
    with console.stage_progress() as progress:
        plan = plan_export(checkpoint, scores, request, progress)
        pairs = [decision for decision in plan.tensors if decision.rank is not None]
        found = tuned_numbers(checkpoint, scores, plan, progress=progress)
    assert found is not None
    return {
        "format": args.format,
        "layout": plan.layout,
        "types": list(args.types),
        "nbytes": args.bytes,
        "minutes": args.minutes,
        "ranking": str(dict(scores.algorithm).get("name")),
        "pairs": len(pairs),
        "numbers_of_pairs": sum((decision.rank or 0) * sum(decision.shape) for decision in pairs),
        "pair_rate": PAIR_RATE if pairs else None,
        "adapters": plan.adapters,
        "weights": sum(prod(info.shape) for info in checkpoint.tensors.values()),
        "predicted_loss": plan.predicted_loss,
        "predicted_divergence": plan.predicted_divergence,
        **asdict(found.result),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="gguf")
    parser.add_argument("--layout", default="factored")
    parser.add_argument("--types", type=lambda names: tuple(names.split(",")), default=(), help="default: the format's")
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--scores", type=Path, required=True)
    args = parser.parse_args()
    row = tuned(args, args.scores)
    print(row)
    add_rows(RESULTS, "rows", [row], ("format", "layout", "types", "nbytes", "minutes", "ranking"))


if __name__ == "__main__":
    main()
