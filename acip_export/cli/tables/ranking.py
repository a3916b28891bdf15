"""Print what a ranking measured."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.cli import output as console
from acip_export.cli.tables.common import plain_table

if TYPE_CHECKING:
    from acip_export.artifacts.scores import ScoreFile


def show_ranking(scores: ScoreFile, file: Path) -> None:
    """The measured curve, and what to do next."""
    causal = scores.task == "causal"

    def shown(loss: float) -> str:
        return f"{exp(loss):.2f}" if causal else f"{loss:.4f}"

    adapted = any(point.loss_with_adapters is not None for point in scores.curve)
    columns = ["parameters kept", "perplexity" if causal else scores.loss_unit, *(["with adapters"] if adapted else [])]
    measured = scores.curve[0].divergence is not None
    if measured:
        columns += ["KL", *(["with adapters"] if adapted else [])]
    if scores.curve[0].spearman is not None:
        columns += ["similarities: Spearman", "mean error"]
    table = plain_table(*columns)
    for point in scores.curve:
        row = [f"{point.ratio:.0%}", shown(point.loss)]
        if adapted:
            row.append("" if point.loss_with_adapters is None else shown(point.loss_with_adapters))
        if measured:
            divergences = [point.divergence, *([point.divergence_with_adapters] if adapted else [])]
            row += ["" if divergence is None else f"{divergence:.4f}" for divergence in divergences]
        if point.spearman is not None and point.similarity_error is not None:
            row += [f"{point.spearman:.4f}", f"{point.similarity_error:.4f}"]
        table.add_row(*row)
    console.out.print(table)
    console.say(f"score file written to {file}; next:  acip-export --budget 50% --format gguf")
