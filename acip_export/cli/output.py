"""Drawing: results on stdout, progress and diagnostics on stderr. Nothing else in the package prints."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from acip_export.errors import AcipError
from acip_export.formats.targets import TARGETS
from acip_export.units import format_bytes
from acip_export.weight_types import types_of

if TYPE_CHECKING:
    from acip_export.api import StageProgress
    from acip_export.artifacts.plan import Plan, TensorDecision
    from acip_export.artifacts.report import Report
    from acip_export.artifacts.scores import ScoreFile
    from acip_export.ranking import Progress as RankingProgress

# Wide enough for every table when nobody's terminal says otherwise.
_WITHIN_LAYER = re.compile(r"^.*\blayers?\.\d+\.")
_WIDTH = None if sys.stdout.isatty() else 120

out = Console(highlight=False, width=_WIDTH)
err = Console(stderr=True, highlight=False)


def print_json(data: Any) -> None:
    """Machine-readable output: exactly one JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def print_error(error: AcipError) -> None:
    first, _, rest = str(error).partition("\n")
    err.print("[bold red]error:[/] ", end="")
    err.print(first, markup=False)
    if rest:
        err.print(rest, markup=False)


def note(message: str) -> None:
    """A diagnostic, on stderr."""
    err.print(message, markup=False, style="dim")


@contextmanager
def stage_bars() -> Iterator[Callable[[StageProgress], None]]:
    """Progress bars, one per stage; silent when stderr is no terminal."""
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[item]}"),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    tasks: dict[str, Any] = {}
    with bars:

        def update(progress: StageProgress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, item="")
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total, item=progress.item)

        yield update


@contextmanager
def ranking_bars() -> Iterator[Callable[[RankingProgress], None]]:
    """One bar per phase of a ranking, with the current ratio, loss and speed."""
    from acip_export.api import StageProgress

    with stage_bars() as update:

        def draw(progress: RankingProgress) -> None:
            parts = [f"ratio {progress.ratio:.2f}" if progress.phase != "statistics" else ""]
            parts += [f"loss {progress.loss:.3f}" if progress.loss is not None else ""]
            parts += [f"{progress.tokens_per_second:,.0f} tokens/s" if progress.tokens_per_second else ""]
            if progress.total is None and progress.eta_seconds is not None:
                parts.append(f"about {progress.eta_seconds:.0f} s left")
            item = "  ".join(part for part in parts if part)
            update(StageProgress(progress.phase, progress.step, progress.total, item))

        yield draw


def show_ranking(scores: ScoreFile, file: Path) -> None:
    """The measured curve, and what to do next."""
    causal = scores.task == "causal"

    def shown(loss: float) -> str:
        return f"{exp(loss):.2f}" if causal else f"{loss:.4f}"

    columns = ["parameters kept", "perplexity" if causal else scores.loss_unit, "with adapters"]
    if scores.curve[0].spearman is not None:
        columns += ["Spearman of similarities", "mean error of similarities"]
    table = Table(*columns, box=None, padding=(0, 2), header_style="dim")
    for point in scores.curve:
        row = [f"{point.ratio:.0%}", shown(point.loss)]
        row.append("" if point.loss_with_adapters is None else shown(point.loss_with_adapters))
        if point.spearman is not None and point.similarity_error is not None:
            row += [f"{point.spearman:.4f}", f"{point.similarity_error:.4f}"]
        table.add_row(*row)
    out.print(table)
    out.print(f"score file written to {file}; next:  acip-export --budget 4GB --format gguf", markup=False)


def show_plan(plan: Plan, verbose: bool) -> None:
    """The budget, where its bytes go, and what was chosen, folded by kind of layer."""
    title = f"{plan.model} → {plan.format} ({plan.layout})"
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("budget", format_bytes(plan.budget_bytes), f"{plan.budget_bytes:,} bytes of {plan.budget_scope}")
    for name, size in plan.breakdown.items():
        if size == 0:
            continue
        table.add_row(
            f"  {name.replace('_', ' ')}", format_bytes(size), "" if plan.counts(name) else "not in the budget"
        )
    used = plan.used_bytes
    table.add_row("used", format_bytes(used), f"{used / plan.budget_bytes:.2%} of the budget")
    table.add_row("left", format_bytes(plan.certificate.bytes_left), _upgrade(plan))
    table.add_row("files", format_bytes(plan.planned_bytes), f"{plan.size_ratio:.3f} of the dense model's bytes")
    bound = f"(lower bound {plan.certificate.lower_bound:.4f})"
    if plan.predicted_perplexity is not None:
        quality = f"{plan.predicted_loss:.4f} {plan.loss_unit} above dense {bound}"
        table.add_row("predicted perplexity", f"{plan.predicted_perplexity:.2f}", quality)
    else:
        bound = f"(lower bound {plan.certificate.lower_bound:.2e})"
        table.add_row("predicted loss", f"{plan.predicted_loss:.2e}", f"{plan.loss_unit} {bound}")
    serving = plan.serving
    table.add_row(
        "runtime",
        f"{serving.context} tokens",
        f"KV cache {serving.cache_type}, prompts in batches of {serving.prompt_batch}"
        if plan.task == "causal"
        else f"a text, {serving.prompt_batch} in a batch of texts",
    )
    out.print(table)
    out.print()
    out.print(_tensor_table(plan) if verbose else _folded_table(plan))
    for line in (*plan.notes, *_held_back(plan)):
        out.print(f"• {line}", markup=False)


def _held_back(plan: Plan) -> Iterator[str]:
    """Why the plan is not better: what else is in the budget, and what the target forbids."""
    buffers = plan.breakdown["compute"] + plan.breakdown["output"] if plan.certificate.alternatives else 0
    for other in plan.certificate.alternatives:
        if other.change.startswith("--prompt-batch"):
            part = f"buffers take {buffers / plan.budget_bytes:.0%} of the budget"
        else:
            part = f"the KV cache takes {plan.breakdown['kv_cache'] / plan.budget_bytes:.0%} of the budget"
        quality = (
            f"loss {other.predicted_loss:.4f}"
            if other.predicted_perplexity is None
            else f"perplexity {other.predicted_perplexity:.2f}"
        )
        yield f"{part}; predicted with  {other.change}:  {quality}"
    by_tensors: dict[tuple[str, str], list[str]] = {}
    for refusal in plan.certificate.refused_types:
        which = refusal.example if refusal.tensors == 1 else f"{refusal.example} and {refusal.tensors - 1} more"
        by_tensors.setdefault((which, refusal.reason), []).append(refusal.type)
    for (which, reason), types in by_tensors.items():
        yield f"{which}: not {', '.join(types)} ({reason})"


def _upgrade(plan: Plan) -> str:
    if plan.certificate.next_upgrade is None:
        return "nothing left to improve"
    return f"next upgrade: {plan.certificate.next_upgrade} (+{format_bytes(plan.certificate.next_upgrade_bytes or 0)})"


def _choice(decision: TensorDecision) -> str:
    if decision.rank is None:
        return str(decision.type)
    formats = (
        decision.down_type if decision.down_type == decision.up_type else (f"{decision.down_type}·{decision.up_type}")
    )
    return f"r{decision.rank} {formats}"


def _folded_table(plan: Plan) -> Table:
    """Tensors that differ only in their layer number share a row."""
    groups: dict[str, list[TensorDecision]] = defaultdict(list)
    for decision in plan.tensors:
        if len(decision.shape) == 2:
            groups[_WITHIN_LAYER.sub("", decision.module)].append(decision)
    table = Table("tensors", "n", "shape", "bytes", "what they become", box=None, padding=(0, 2), header_style="dim")
    for name, members in groups.items():
        counts: dict[str, int] = defaultdict(int)
        for member in members:
            counts[_choice(member)] += 1
        chosen = ", ".join(choice if n == 1 else f"{n}x {choice}" for choice, n in counts.items())
        rows, columns = members[0].shape
        size = format_bytes(sum(member.nbytes for member in members))
        table.add_row(name, str(len(members)), f"{rows}x{columns}", size, chosen)
    return table


def _tensor_table(plan: Plan) -> Table:
    table = Table("tensor", "shape", "bytes", "becomes", box=None, padding=(0, 2), header_style="dim")
    for decision in plan.tensors:
        shape = "x".join(str(extent) for extent in decision.shape)
        table.add_row(decision.name, shape, f"{decision.nbytes:,}", _choice(decision))
    return table


def show_reports(reports: list[Report]) -> None:
    """One row per runtime and export."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("export", "budget", "planned", "written", "runtime", "perplexity", "dense", "KL", "tok/s"):
        table.add_column(column, justify="left" if column in ("export", "runtime") else "right", no_wrap=True)
    for report in reports:
        dense = "" if report.dense_perplexity is None else f"{report.dense_perplexity.perplexity:.2f}"
        for runtime in report.runtimes:
            table.add_row(
                f"{report.format} {report.layout}",
                format_bytes(report.budget_bytes),
                f"{report.planned_bytes:,}",
                f"{report.written_bytes:,}",
                runtime.runtime,
                "" if runtime.perplexity is None else f"{runtime.perplexity.perplexity:.2f}",
                dense,
                "" if runtime.agreement is None else f"{runtime.agreement.mean_kl:.1e}",
                # What an encoder does is read.
                "" if runtime.speed is None else f"{runtime.speed.decode or runtime.speed.prefill:.0f}",
            )
    out.print(table)
    for report in reports:
        if report.similarity is not None and report.similarity_spearman is not None:
            error = report.similarity_error or 0.0
            out.print(
                f"{report.format} {report.layout}: embeddings {report.similarity:.5f} similar to the dense model's; "
                f"similarities of texts kept: Spearman {report.similarity_spearman:.5f}, mean error {error:.5f}"
            )


def show_export(plan: Plan, directory: Path) -> None:
    """Where the export is, and how to run it."""
    from acip_export.formats.registry import converter

    out.print(f"\n[bold]{format_bytes(plan.planned_bytes)}[/] in {directory}, as planned. Run it with:")
    commands = converter(plan.format).run_commands(plan, directory)
    for command in [c for c in commands if c.language == "console"] or commands[:1]:
        out.print(command.text, markup=False, soft_wrap=True)
        if command.note:
            out.print(f"  ({command.note})", markup=False, style="dim")


def show_formats() -> None:
    """Targets with their layouts and types."""
    for name, target in TARGETS.items():
        out.print(f"[bold]{name}[/]  KV cache: {', '.join(target.cache_types)}")
        for layout in target.layouts:
            out.print(f"  layout {layout.name}: {layout.description}", markup=False)
        for runtime, layouts in target.runtimes.items():
            out.print(f"  runtime {runtime}: {', '.join(layouts)}", markup=False)
        table = Table(
            "type", "bits/weight", "block", "rounding error", "", box=None, padding=(0, 2), header_style="dim"
        )
        for f in types_of(name):
            default = "default" if f.name in target.types else "refused" if f.name in target.refused else ""
            table.add_row(f.name, f"{f.bits_per_weight:.3f}", str(f.block), f"{f.relative_mse**0.5:.4f}", default)
        out.print(table)
