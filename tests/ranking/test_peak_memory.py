"""The memory that a ranking is said to take, phase by phase, is what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from acip_export.machine import Machine
from acip_export.model.shape import ModelShape
from acip_export.ranking import DataConfig, peak_memory
from acip_export.ranking.algorithms import find_algorithm
from acip_export.ranking.block_sizes import BlockSizes
from acip_export.ranking.estimate import RankModel, open_sizes
from acip_export.ranking.layer_memory import components_bytes, factors_bytes
from acip_export.ranking.peak_memory import Held, Passes, peak_by_phase
from benchmarks.random_model import write_random_model

# Small, but with phases that differ by more than the C library's heap does: many outputs, few of them, many tokens.
SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 2560,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
TOKENS, CURVE = 2048, 512
# Of libraries in other versions, and of what multiplies matrices on other processors.
BESIDE = 80_000_000
# The phases of each stage.
STAGES = {
    "statistics": ("forward", "inputs", "head", "backward", "gradients"),
    "components": ("components",),
    "fisher": ("fisher",),
    "curve": ("curve",),
}
MEASURED = """
import json, sys, threading, time
from pathlib import Path
import torch
from acip_export.ranking import DataConfig, mask_gradients, rank_model, stage

torch.set_num_threads(2)
model, text, tokens, curve = sys.argv[1:]
peaks, now = {}, "before"


def anonymous():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


def watch():
    while now is not None:
        peaks[now] = max(peaks.get(now, 0), anonymous())
        time.sleep(0.001)


def measured(module, function, name):
    whole = getattr(module, function)

    def part(*args, **kwargs):
        global now
        now = name
        try:
            return whole(*args, **kwargs)
        finally:
            now = "between"

    setattr(module, function, part)


measured(stage, "collect_statistics", "statistics")
measured(stage, "factorize_model", "components")
measured(mask_gradients, "component_fisher", "fisher")
measured(stage, "measure_curve", "curve")
threading.Thread(target=watch, daemon=True).start()
config = DataConfig(statistics_tokens=int(tokens), gradient_tokens=int(tokens), curve_tokens=int(curve))
rank_model(model, text, algorithm="fisher", calibration=config, out=Path(model) / "s.acip")
now = None
print(json.dumps(peaks))
"""


@pytest.mark.parametrize(
    ("threads", "expected"),
    [
        (1, 100 + 7),  # what is worked on, and the result before
        (2, 2 * 100 + 2 * 7),  # and one that is done
        (8, 8 * 100 + 2 * 7),
        (11, 11 * 100 + 7),
        (64, 12 * 100),  # all of them begin at once: none is done yet
    ],
)
def test_works_side_by_side_and_their_results(threads: int, expected: int) -> None:
    assert peak_memory._together(range(12), lambda _: 100, threads, lambda _: 7) == expected


def test_layers_of_many_blocks_are_factorized_side_by_side() -> None:
    """Whatever the number of processors, and no more than there are layers."""
    block = BlockSizes(((64, 64), (64, 64)), (64,))
    shape = ModelShape("LlamaForCausalLM", 8, 64, 64, 4, 4, 16, 100, 64, tied_embeddings=True)
    counted = [
        peak_by_phase(shape, [block] * 8, Held(4, 4, 4, 4), Passes(8, 8, 8), threads)["components"]
        for threads in (15, 16, 64)
    ]
    assert counted[1] - counted[0] == components_bytes((64, 64)) - factors_bytes((64, 64), 4)
    assert counted[2] == counted[1]


@pytest.mark.slow
def test_each_phase_takes_what_is_counted(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is measured on Linux")
    model, text = tmp_path / "model", tmp_path / "text.txt"
    write_random_model(model, SHAPE)
    text.write_text("".join(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))))
    command = [sys.executable, "-c", MEASURED, *map(str, (model, text, TOKENS, CURVE))]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    calibration = DataConfig(statistics_tokens=TOKENS, gradient_tokens=TOKENS, curve_tokens=CURVE)
    sizes = RankModel(open_sizes(model))
    counted = sizes.estimate(calibration, find_algorithm("fisher"), None, Machine(1e11, 5e10, 1e6, 2)).memory_by_phase
    for stage, phases in STAGES.items():
        expected, measured = max(counted[phase] for phase in phases), found[stage]
        assert 0.85 * expected - BESIDE < measured < 1.05 * expected + BESIDE, (stage, expected, found)
