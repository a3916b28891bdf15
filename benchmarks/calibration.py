"""How well predictions are calibrated: plans of several sizes, predicted and measured, in PyTorch and without files.

    python -m benchmarks.calibration MODEL --budgets 145MB,112MB,105.4MB,93.5MB,85MB [--format gguf] [--tokens 2048]
    python -m benchmarks.calibration MODEL --budgets 105.4MB --candidates 5

Prints JSON: of every budget, with and without calibration, the predicted loss and the divergence from the dense model
on what the ranking held out, from the rounded weights of the plan; and how long each plan took. Those whose tokens
calibrated the prediction are left out, where enough others are left.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from acip_export.api.calibration import rounded_weights
from acip_export.api.opening import open_scores
from acip_export.api.plan import plan_export
from acip_export.api.text import held_out_text
from acip_export.artifacts.plan import Plan
from acip_export.errors import AcipError
from acip_export.measurement.plans import measure_plans
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, resolve
from acip_export.units import parse_bytes

# Calibration reads the first ones.
_CALIBRATED_ON = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--format", default="gguf")
    parser.add_argument("--budgets", required=True, help="of files, by comma")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--candidates", type=int, default=1)
    given = parser.parse_args()
    checkpoint = Checkpoint.open(given.model)
    scores = open_scores(checkpoint, given.scores)
    text = held_out_text(checkpoint, scores, 512)
    if text is None:
        sys.exit("the text that the ranking held out is not here")
    windows = torch.from_numpy(text.windows)
    fresh = windows[_CALIBRATED_ON // windows.shape[1] :]
    windows = (fresh if len(fresh) else windows)[: max(1, given.tokens // windows.shape[1])]
    plans: list[tuple[str, Plan, float]] = []
    for budget in given.budgets.split(","):
        for calibrate in (False, True):
            request = PlanRequest(
                given.format,
                parse_bytes(budget),
                "file",
                calibrate=calibrate,
                candidates=given.candidates if calibrate else 1,
            )
            start = time.perf_counter()
            plan = plan_export(checkpoint, scores, request)
            plans.append((budget, plan, time.perf_counter() - start))
    resolved = resolve(PlanRequest(given.format, rounding=plans[0][1].rounding), checkpoint)
    weights = rounded_weights(checkpoint, scores, resolved.spaces[0])
    measured = measure_plans(checkpoint, weights, [plan for _, plan, _ in plans], windows)
    rows = [
        {
            "budget": budget,
            "calibrated": plan.calibrated,
            "seconds": round(seconds, 1),
            "predicted": plan.predicted_loss,
            "candidates": [each.change for each in plan.candidates],
            **({"failure": str(found)} if isinstance(found, AcipError) else {"kl": found.kl, "error": found.error}),
        }
        for (budget, plan, seconds), found in zip(plans, measured, strict=True)
    ]
    print(json.dumps({"model": checkpoint.name, "tokens": windows.numel(), "plans": rows}, indent=1))


if __name__ == "__main__":
    main()
