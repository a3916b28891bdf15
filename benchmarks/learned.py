"""What learning gains on a real model in a given time: perplexity by size, without and with the learned adapters.

    python -m benchmarks.learned --time 20min          ranks the model of  make real-model
    python -m benchmarks.learned --scores FILE ...     only records what score files of that model say

Without adapters the order of the components alone decides, which learning changes little; the training-free ``fisher``
order is where it starts. Perplexities are of the end of the calibration text, which nothing else sees. Adds to
benchmarks/learned.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from acip_export.artifacts.scores import ScoreFile, load_scores
from samples import real

RESULTS = Path(__file__).with_suffix(".json")
SETTINGS = ("batch", "max_steps", "post_tune", "learning_rate", "adapter_learning_rate", "adapter_rank", "stop_ratio")


def perplexity(loss: float | None) -> float | None:
    return None if loss is None else round(math.exp(loss), 2)


def figures(scores: ScoreFile) -> dict[str, Any]:
    """Return what the curve of a score file says, with the settings that it was learned with."""
    settings = dict(scores.algorithm)
    return {
        "algorithm": settings.get("name"),
        "settings": {name: settings[name] for name in SETTINGS if name in settings},
        "versions": dict(scores.versions),
        "curve": [
            {
                "ratio": point.ratio,
                "perplexity": perplexity(point.loss),
                "with_adapters": perplexity(point.loss_with_adapters),
            }
            for point in scores.curve
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", help="as  rank --time  has it")
    parser.add_argument("--scores", type=Path, nargs="+", default=[])
    arguments = parser.parse_args()
    files: list[Path] = arguments.scores
    if arguments.time:
        made = real.cached()
        out = made.model.parent / f"learned-{arguments.time}.acip"
        words = ("rank", made.model, "--data", made.calibration, "--time", arguments.time, "-o", out, "--force")
        subprocess.run([sys.executable, "-m", "acip_export", *map(str, words), "--no-measure-rounding"], check=True)
        files = [*files, out]
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": []}
    results["runs"] += [figures(load_scores(file)) for file in files]
    results["machine"] = {"processor": platform.machine(), "cores": os.cpu_count()}
    results["date"] = time.strftime("%Y-%m-%d")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for run in results["runs"]:
        print(run["settings"], *run["curve"], sep="\n  ")


if __name__ == "__main__":
    main()
