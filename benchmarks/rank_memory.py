"""Peak memory and time of a training-free ranking over the number of layers, each in a process of its own.

    python -m benchmarks.rank_memory [--layers 8 16 32] [--hidden 256] [--intermediate 704] [--scratch DIRECTORY]

Random weights of one width; writes benchmarks/rank_memory.json. The peak may grow by the weights, which become pairs of
factors in the end (up to twice the bytes of a square matrix), and by nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from acip_export.model.checkpoint import Checkpoint
from benchmarks.random_model import write_random_model

RESULTS = Path(__file__).with_suffix(".json")
TOKENS, CURVE_TOKENS = 2048, 512
_RANK = """
import json, resource, sys, time
from pathlib import Path
from acip_export.ranking import DataConfig, rank_model
model, text, algorithm, tokens, curve = sys.argv[1:]
start = time.perf_counter()
config = DataConfig(statistics_tokens=int(tokens), curve_tokens=int(curve), curve_ratios=(1.0, 0.5))
rank_model(model, text, algorithm=algorithm, calibration=config, precision="model", out=Path(model) / "s.acip")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "peak_bytes": peak}))
"""


def measure(layers: int, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Rank a model of ``layers`` layers, and return its figures."""
    model = scratch / f"model{layers}"
    head = 64
    write_random_model(
        model,
        {
            "vocab_size": 8192,
            "hidden_size": args.hidden,
            "intermediate_size": args.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": args.hidden // head,
            "num_key_value_heads": max(1, args.hidden // head // 4),
            "head_dim": head,
        },
    )
    text = scratch / "text.txt"
    if not text.exists():
        text.write_text(
            "".join(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py")))
        )
    command = [sys.executable, "-c", _RANK, model, text, args.algorithm, TOKENS, CURVE_TOKENS]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    shapes = Checkpoint.open(model).linear_modules.values()
    return {
        "layers": layers,
        **json.loads(done.stdout.splitlines()[-1]),
        "weight_bytes": 2 * sum(out * inputs for out, inputs in shapes),
        "factor_bytes": 2 * sum(min(shape) * sum(shape) for shape in shapes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--algorithm", default="fisher")
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as directory:
        for layers in args.layers:
            runs.append(measure(layers, args, Path(directory)))
            print(runs[-1], flush=True)
    first, last = runs[0], runs[-1]
    growth = {key: last[key] - first[key] for key in ("peak_bytes", "weight_bytes", "factor_bytes")}
    result = {
        "algorithm": args.algorithm,
        "hidden": args.hidden,
        "intermediate": args.intermediate,
        "tokens": TOKENS,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
        "runs": runs,
        "growth": growth,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
