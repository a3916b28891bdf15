"""What ``make real`` runs: a real model of 135 million weights, ranked once without training, exported at five budgets.

    python -m benchmarks.real                                       everything; writes benchmarks/real.json
    python -m benchmarks.real --format gguf --budget 105MB          some of it; only prints
    python -m benchmarks.real --tokens 2048 --budget 105MB          with a ranking of few tokens, to see it work

Model and text are those of ``samples/real.py``. Budgets are of files, so that the sizes compare with those of other
tools' files. Every export is written, opened in its runtime and compared with the dense model on text that the ranking
has not seen: KL(dense || export) and perplexity. The score file is kept beside the model, in the user's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from acip_export.api import export_model, plan_export
from acip_export.artifacts.scores import ScoreFile, load_scores
from acip_export.cli import output as console
from acip_export.errors import AcipError, InfeasibleBudgetError, ScoreFileError, VerificationError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from acip_export.progress import Progress, ProgressCallback
from acip_export.ranking import DataConfig, rank_model
from acip_export.text.packing import pack_text
from acip_export.units import format_bytes, parse_bytes
from acip_export.verification.export import EvaluationText
from samples import real
from samples.marked import with_marked

OUT = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "measurements" / "rivals.md"
FORMATS = {"gguf": "stock", "onnx": "factored"}
# Files: of about the bytes of Q8_0, Q5_K_M, Q4_K_M, Q3_K_M, and below what presets of this model have.
BUDGETS = ("145MB", "112MB", "105MB", "93MB", "80MB")
CONTEXT = 512
MEASURED_TOKENS = 4_096
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "gguf", "xllamacpp", "numpy")


def ranked(made: real.Real, algorithm: str, tokens: int | None) -> tuple[ScoreFile, dict[str, Any]]:
    """The score file of an earlier run with the same settings, or a new one; and what ranking took."""
    checkpoint = Checkpoint.open(made.model)
    file = made.model.parent / f"{algorithm}-{tokens or 'default'}.acip"
    record = file.with_suffix(".json")
    if file.is_file() and record.is_file():
        try:
            scores = load_scores(file)
            scores.check_model(checkpoint)
        except ScoreFileError as error:
            console.note(f"{error}\nranking again")
        else:
            console.note(f"score file of an earlier run: {file}")
            return scores, json.loads(record.read_text())
    calibration = DataConfig(context=CONTEXT)
    if tokens is not None:
        calibration = DataConfig(
            context=CONTEXT,
            statistics_tokens=tokens,
            curve_tokens=max(CONTEXT, tokens // 4),
            most_tokens=2 * tokens,
            curve_ratios=(1.0, 0.8, 0.5),
        )
    started = time.perf_counter()
    with console.stage_progress() as bars:
        scores = rank_model(
            made.model,
            made.calibration,
            algorithm=algorithm,
            calibration=calibration,
            out=file,
            force=True,
            progress=bars,
        )
    took = {
        "algorithm": algorithm,
        "statistics_tokens": calibration.statistics_tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "score_file_bytes": file.stat().st_size,
        "model_bytes": checkpoint.weight_bytes,
        "machine": machine(),
    }
    record.write_text(json.dumps(took, indent=1) + "\n")
    return load_scores(file), took


def held_out(made: real.Real) -> EvaluationText:
    """Windows spread evenly over the evaluation text."""
    packed = pack_text(made.model, made.evaluation, CONTEXT)
    count = min(len(packed.windows), MEASURED_TOKENS // CONTEXT)
    chosen = [i * len(packed.windows) // count for i in range(count)]
    return EvaluationText(packed.windows[chosen].numpy(), made.evaluation.name, packed.sha256)


def export(
    made: real.Real, scores: ScoreFile, fmt: str, budget: str, text: EvaluationText, out: Path
) -> dict[str, Any]:
    """Plan, write and verify one export, and return its figures.

    Raises:
        InfeasibleBudgetError: nothing fits. VerificationError: the export is not what was planned.
    """
    checkpoint = Checkpoint.open(made.model)
    request = PlanRequest(fmt, parse_bytes(budget), "file", layout=FORMATS[fmt], context=CONTEXT, calibrate=True)
    with console.stage_progress() as bars:
        phases = Phases(bars)
        plan = plan_export(checkpoint, scores, request, phases)
        phases.begin("materialize")
        # The page's slider over sizes is not looked at here, and takes a plan for each.
        report = export_model(checkpoint, scores, plan, out, True, text=text, sizes=(), progress=phases)
    assert report is not None
    runtime = report.runtimes[0]
    assert runtime.divergence is not None
    assert runtime.perplexity is not None
    assert report.dense_perplexity is not None
    return {
        "format": fmt,
        "layout": plan.layout,
        "runtime": runtime.runtime,
        "budget_bytes": plan.budget_bytes,
        "planned_bytes": report.planned_bytes,
        "written_bytes": report.written_bytes,
        "types": types_of(plan.tensors),
        "predicted_loss": plan.predicted_loss,
        "divergence": asdict(runtime.divergence),
        "perplexity": runtime.perplexity.perplexity,
        "dense_perplexity": report.dense_perplexity.perplexity,
        "tokens": runtime.perplexity.tokens,
        "tokens_per_second": None if runtime.speed is None else runtime.speed.decode,
        "seconds": phases.seconds(),
        "peak_bytes": peak_bytes(),
    }


class Phases:
    """Pass on reports of progress, and note when planning, materializing, converting and verifying begin."""

    def __init__(self, pass_on: ProgressCallback) -> None:
        self.pass_on = pass_on
        self.began: dict[str, float] = {}
        self.begin("plan")
        forget_peak()

    def begin(self, phase: str) -> None:
        """Note that one begins now, unless it has."""
        self.began.setdefault(phase, time.perf_counter())

    def __call__(self, progress: Progress) -> None:
        """See :data:`acip_export.progress.ProgressCallback`."""
        if progress.stage in ("convert", "verify"):
            self.begin(progress.stage)
        self.pass_on(progress)

    def seconds(self) -> dict[str, float]:
        """What each phase took; the last one ends now."""
        ends = [*list(self.began.values())[1:], time.perf_counter()]
        return {phase: round(end - began, 1) for (phase, began), end in zip(self.began.items(), ends, strict=True)}


def forget_peak() -> None:
    """Count this process's peak anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Largest resident memory of this process, mapped files included, without that of the runtimes' processes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def types_of(tensors: Any) -> dict[str, int]:
    """How many weights each type has; pairs count as ``DOWN*UP``."""
    counted: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) == 2:
            name = tensor.type if tensor.rank is None else f"{tensor.down_type}*{tensor.up_type}"
            counted[name] = counted.get(name, 0) + tensor.shape[0] * tensor.shape[1]
    return counted


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| export | budget (files) | planned = written bytes | predicted KL | KL to dense | same top "
        "| perplexity | dense |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        head = f"| {row['format']}, {FORMATS[row['format']]} | {format_bytes(row['budget_bytes'])} "
        if "smallest_budget_bytes" in row:
            lines.append(f"{head}| does not fit: {row['smallest_budget_bytes']:,} at least | | | | | |")
            continue
        if "failed" in row:
            lines.append(f"{head}| **failed**, see the JSON file | | | | | |")
            continue
        same = row["planned_bytes"] == row["written_bytes"]
        size = f"{row['written_bytes']:,}" if same else f"{row['planned_bytes']:,}, WRITTEN {row['written_bytes']:,}"
        lines.append(
            f"{head}| {size} | {row['predicted_loss']:.4f} "
            f"| {row['divergence']['mean_kl']:.4f} | {row['divergence']['same_top']:.1%} "
            f"| {row['perplexity']:.2f} | {row['dense_perplexity']:.2f} |"
        )
    return "\n".join(lines)


def draw() -> None:
    """Put the table of benchmarks/real.json into the page that shows it."""
    rows = json.loads(OUT.read_text())["rows"]
    PAGE.write_text(with_marked(PAGE.read_text(encoding="utf-8"), "real", table(rows)), encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "system": platform.system(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }


def document(
    made: real.Real, ranking: dict[str, Any], text: EvaluationText, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """What benchmarks/real.json holds."""
    return {
        "benchmark": "real",
        "model": json.loads((made.model.parent / real.RECORD).read_text()),
        "ranking": ranking,
        "text": {"source": text.source, "sha256": text.sha256, "tokens": int(text.windows.size)},
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", nargs="*", choices=tuple(FORMATS), default=tuple(FORMATS))
    parser.add_argument("--budget", nargs="*", default=BUDGETS)
    parser.add_argument("--algorithm", default="fisher")
    parser.add_argument("--tokens", type=int, help="for the ranking's statistics; default: what rank takes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/real.json, for everything at its defaults")
    parser.add_argument("--draw", action="store_true", help="only put the table of benchmarks/real.json into its page")
    arguments = parser.parse_args()
    if arguments.draw:
        draw()
        return
    everything = tuple(arguments.format) == tuple(FORMATS) and tuple(arguments.budget) == BUDGETS
    target = arguments.out or (OUT if everything and arguments.tokens is None else None)
    made = real.make(real.cached().model.parent)
    scores, ranking = ranked(made, arguments.algorithm, arguments.tokens)
    text = held_out(made)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for fmt in arguments.format:
            for budget in arguments.budget:
                try:
                    rows.append(export(made, scores, fmt, budget, text, Path(scratch) / "export"))
                except InfeasibleBudgetError as error:
                    smallest = {"smallest_budget_bytes": error.smallest_feasible_bytes}
                    rows.append({"format": fmt, "budget_bytes": parse_bytes(budget), **smallest})
                except VerificationError as error:
                    console.print_error(error)
                    rows.append({"format": fmt, "budget_bytes": parse_bytes(budget), "failed": str(error)})
                console.note(table(rows[-1:]).splitlines()[-1])
                if target is not None:  # after every export: one takes minutes
                    target.write_text(json.dumps(document(made, ranking, text, rows), indent=1) + "\n")
    console.out.print(table(rows), markup=False, soft_wrap=True)
    if target == OUT:
        draw()
    if any("failed" in row for row in rows):
        raise SystemExit("an export is not what was planned")


if __name__ == "__main__":
    try:
        main()
    except AcipError as error:
        console.print_error(error)
        raise SystemExit(1) from None
