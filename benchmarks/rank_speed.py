"""Time per step and peak memory of a ranking run, against a straightforward implementation of the paper's.

    python -m benchmarks.rank_speed                    writes benchmarks/rank_speed.json

Both rank the same random bfloat16 Llama on the same windows with the paper's settings (plain SVD basis, cross-entropy,
masks start at one), with learning rate and penalty raised so that the run from ratio 1 to 0.4 is short. Then come as
many steps of the adapters as the masks took. Each runs in a process of its own with one thread, and they take turns,
step by step: other work on the machine, which makes a second of a processor's time worth less, meets all alike. Memory
is the process's peak resident size above what it was with the libraries loaded and before the model was. Time is that
of the processor.

Ours runs twice: with products in bfloat16, as it does by default where the processor has instructions for them, and in
float32 as everywhere else.

The straightforward run does what the paper's equations say, with PyTorch's modules: factors U and S V^T in float32
beside the dense float32 weight that they came from, a mask over all components in every step, adapters as modules of
their own, AdamW over masks and adapters.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from acip_export.machine import fast_bfloat16

SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SETTINGS: dict[str, Any] = {
    "learning_rate": 4e-3,
    "penalty": 1e-2,
    "penalty_growth": 1.2,
    "stop_ratio": 0.4,
    "batch": 4,
}
RUNS = ("plain", "float32", "bfloat16")
BANDS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
CONTEXT = 256


class PeakMemory:
    """Peak resident bytes of this process above a start, sampled every 10 ms."""

    def __init__(self) -> None:
        self.start = self.peak = self._resident()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self._resident())
            time.sleep(0.01)

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Steps:
    """By step: processor seconds, ratio afterwards, whether the masks were done."""

    seconds: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    tuning: list[bool] = field(default_factory=list)

    def add(self, seconds: float, ratio: float, tuning: bool) -> None:
        self.seconds.append(seconds)
        self.ratio.append(round(ratio, 3))
        self.tuning.append(tuning)


class PlainLinear(nn.Module):
    def __init__(self, dense: nn.Linear, scale: float, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.dense, self.scale = dense, scale
        u, s, vt = torch.linalg.svd(dense.weight.float(), full_matrices=False)
        self.u, self.svt = nn.Parameter(u, requires_grad=False), nn.Parameter(s[:, None] * vt, requires_grad=False)
        self.mask = nn.Parameter(torch.full((len(s),), scale))
        self.lora_a, self.lora_b = nn.Linear(dense.in_features, rank, bias=False), nn.Linear(rank, len(u), bias=False)
        nn.init.zeros_(self.lora_b.weight)
        self.dropout, self.alpha = nn.Dropout(dropout), alpha / rank

    @property
    def weight(self) -> Tensor:
        return self.dense.weight

    def forward(self, x: Tensor) -> Tensor:
        p = F.relu(self.mask)
        binary = (p > 0).float() + p / self.scale - (p / self.scale).detach()
        y = F.linear(F.linear(x, self.svt) * binary, self.u)
        return y + self.alpha * self.lora_b(self.lora_a(self.dropout(x)))


def live_ratio(layers: list[PlainLinear]) -> float:
    """As the run counts it: a pair that would be larger than the dense weight counts as dense."""
    present = total = 0
    for layer in layers:
        size, alive = layer.dense.weight.numel(), int((layer.mask.detach() > 0).sum())
        present += min(alive * sum(layer.dense.weight.shape), size)
        total += size
    return present / total


def run_plain(model_path: Path, windows: Tensor, most: int) -> Iterator[Steps]:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).requires_grad_(False)
    layers = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers." in name:
            parent, _, child = name.rpartition(".")
            layers.append(PlainLinear(module, 0.02, 32, 16.0, 0.05))
            setattr(model.get_submodule(parent), child, layers[-1])
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=SETTINGS["learning_rate"], weight_decay=0.0)
    scores = [layer.mask.detach().clone() for layer in layers]
    penalty, steps, mask_steps = SETTINGS["penalty"], Steps(), 0
    tuning = False
    while not tuning or len(steps.seconds) < 2 * mask_steps:
        yield steps
        step = len(steps.seconds)
        begin = time.process_time()
        batch = windows[torch.arange(step * 4, step * 4 + 4) % len(windows)]
        logits = model(input_ids=batch, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        if not tuning:
            loss = loss + penalty * sum(F.relu(layer.mask).sum() for layer in layers)
        loss.backward()
        if tuning:
            for layer in layers:
                layer.mask.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if not tuning:
            mask_steps += 1
            penalty *= SETTINGS["penalty_growth"] if mask_steps % 4 == 0 else 1
            for index, layer in enumerate(layers):
                alive = layer.mask.detach() > 0
                before = scores[index]
                scores[index] = torch.where(alive, layer.mask.detach(), torch.where(before > 0, 0.0, before - 1))
        steps.add(time.process_time() - begin, live_ratio(layers), tuning)
        tuning = tuning or steps.ratio[-1] <= SETTINGS["stop_ratio"] or mask_steps == most
    yield steps


def run_ours(model_path: Path, windows: Tensor, most: int) -> Iterator[Steps]:
    from acip_export.lowrank.components import components
    from acip_export.model.checkpoint import Checkpoint
    from acip_export.ranking import AcipConfig
    from acip_export.ranking.acip_run import AcipRun
    from acip_export.ranking.context import RankContext
    from acip_export.ranking.data import CalibrationData
    from acip_export.ranking.load import load_model
    from acip_export.ranking.masked_linear import AdapterShape, MaskedLinear, replace_linear
    from acip_export.text.packing import PackedText

    checkpoint = Checkpoint.open(model_path)
    model = load_model(checkpoint, torch.device("cpu"), "model")
    config = AcipConfig(**SETTINGS, max_steps=most)
    layers, losses = {}, {}
    for name in checkpoint.linear_modules:
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        parts = components(dense.weight, None, None)
        layers[name] = MaskedLinear(parts, dense, config.mask_scale, AdapterShape(32, 16.0, 0.05))
        losses[name] = 0.5 * parts.singular.double().numpy() ** 2
        replace_linear(model, name, layers[name])
    text = PackedText(windows, "random", "", 1)
    context = RankContext(checkpoint, model, CalibrationData(text, windows, windows, windows, len(windows)))
    run = AcipRun(context, layers, losses, config)
    steps = Steps()
    while not run.masks_done or run.tune_steps < run.mask_steps:
        yield steps
        begin = time.process_time()
        tuning = run.masks_done
        run.tune_step() if tuning else run.mask_step()
        steps.add(time.process_time() - begin, run.ratio(), tuning)
    yield steps


def measure(which: str, model: Path, most: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    windows = torch.randint(SHAPE["vocab_size"], (64, CONTEXT), generator=torch.Generator().manual_seed(0))
    if which == "float32":
        from acip_export.ranking import load as ranked

        ranked.fast_bfloat16 = lambda: False  # type: ignore[attr-defined]
    memory = PeakMemory()
    for steps in (run_plain if which == "plain" else run_ours)(model, windows, most):
        print(json.dumps({**asdict(steps), "peak_bytes": memory.peak - memory.start}), flush=True)
        sys.stdin.readline()


def take_turns(processes: dict[str, subprocess.Popen[str]]) -> dict[str, dict[str, Any]]:
    """One step of each process after the other until all have ended; returns the last that each said."""
    said: dict[str, dict[str, Any]] = {}
    while len(processes) > 0:
        for which, process in list(processes.items()):
            assert process.stdin is not None and process.stdout is not None
            if which in said:
                process.stdin.write("\n")
                process.stdin.flush()
            line = process.stdout.readline()
            if line:
                said[which] = json.loads(line)
                print(which, len(said[which]["seconds"]), said[which]["ratio"][-1:], file=sys.stderr, flush=True)
            elif process.wait() == 0:
                del processes[which]
            else:
                raise subprocess.CalledProcessError(process.returncode, which)
    return said


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Seconds per step over the whole run, by ratio band while the masks move, and of the adapters afterwards."""
    steps = list(zip(measured["seconds"], measured["ratio"], measured["tuning"], strict=True))

    def mean(chosen: list[float]) -> float | None:
        return round(math.fsum(chosen) / len(chosen), 4) if chosen else None

    bands = {
        f"{high}-{low}": mean([s for s, ratio, tuning in steps if not tuning and low < ratio <= high])
        for high, low in itertools.pairwise(BANDS)
    }
    return {
        "peak_bytes": measured["peak_bytes"],
        "mask_steps": sum(not tuning for tuning in measured["tuning"]),
        "tune_steps": sum(measured["tuning"]),
        "last_ratio": measured["ratio"][-1],
        "seconds_per_step": mean(measured["seconds"]),
        "seconds_per_mask_step": mean([s for s, _, tuning in steps if not tuning]),
        "seconds_per_mask_step_by_ratio": bands,
        "seconds_per_tune_step": mean([s for s, _, tuning in steps if tuning]),
    }


def make_model(path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, dtype="bfloat16"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.shape[0] != SHAPE["vocab_size"]:
                # Spectra that fall off, as trained ones do.
                u, s, vt = torch.linalg.svd(torch.randn(parameter.shape), full_matrices=False)
                parameter.copy_((u * s * torch.linspace(1, 0.05, len(s))) @ vt * 0.05)
    model.to(torch.bfloat16).save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mask-steps", type=int, default=100, help="At most; the masks stop at the stop ratio.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "rank_speed.json")
    parser.add_argument("--measure", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.model, args.mask_steps)
        return
    # Freed memory goes back, so that the peak is what was in use and not how it was cut up.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch))
        shared = ["--model", scratch, "--mask-steps", str(args.mask_steps)]
        measured = take_turns(
            {
                which: subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.rank_speed", "--measure", which, *shared],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for which in RUNS
            }
        )
    results = {which: summary(measured[which]) for which in RUNS}
    document = {
        "benchmark": "rank_speed",
        "model": SHAPE,
        "settings": {**SETTINGS, "context": CONTEXT},
        "machine": {
            "processor": platform.machine(),
            "bfloat16": fast_bfloat16(),
            "cores": os.cpu_count(),
            "threads": 1,
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "results": results,
        "of_the_straightforward": {
            which: {
                "time": round(results[which]["seconds_per_step"] / results["plain"]["seconds_per_step"], 3),
                "memory": round(results[which]["peak_bytes"] / results["plain"]["peak_bytes"], 3),
            }
            for which in RUNS[1:]
        },
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(document["of_the_straightforward"], file=sys.stderr)


if __name__ == "__main__":
    main()
