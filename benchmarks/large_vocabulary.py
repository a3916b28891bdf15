"""Rank a small model with a vocabulary of 262,144 tokens, as a user would: time, memory, and what was announced.

    python -m benchmarks.large_vocabulary [--scratch DIRECTORY]

Random bfloat16 weights of 18 layers of 640 (FFN 2,048, tied head), and Python source as text. The logits of
a window of 512 tokens are 537 MB in float32, more than all of the weights: what is held of them decides. Writes
benchmarks/large_vocabulary.json.
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

from benchmarks.gguf_export import watched
from benchmarks.random_model import write_random_model

RESULTS = Path(__file__).with_suffix(".json")
SHAPE = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="where 3 GB may lie")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        model, text = Path(directory) / "model", Path(directory) / "text.txt"
        write_random_model(model, SHAPE)
        sources = sorted(Path(json.__file__).parents[1].glob("*.py"))
        text.write_text("\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in sources)[:1_000_000])
        rank = [sys.executable, "-m", "acip_export", "rank", str(model), "--no-measure-rounding"]
        announced = subprocess.run([*rank, "--estimate", "--json"], check=True, capture_output=True, text=True)
        measured = watched([*rank, "--data", str(text), "-o", str(Path(directory) / "s.acip"), "--quiet"])
    result = {
        "shape": SHAPE,
        "announced": json.loads(announced.stdout),
        "measured": measured,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
