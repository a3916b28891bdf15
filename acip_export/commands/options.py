"""Flags that several commands share, and the request that they add up to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from acip_export.errors import UsageError
from acip_export.plans import BudgetScope
from acip_export.targets import TARGETS
from acip_export.units import parse_bytes

if TYPE_CHECKING:
    from acip_export.plan import PlanRequest

Model = Annotated[str, typer.Option("--model", "-m", help="Model directory or Hugging Face id.", show_default=True)]
Scores = Annotated[Path | None, typer.Option(help="Score file. Default: the *.acip beside the model.")]
Budget = Annotated[str | None, typer.Option(help="Bytes with a unit: 4GB, 900MB, 2GiB.")]
Scope = Annotated[
    BudgetScope,
    typer.Option(
        "--budget-scope",
        help="What the budget covers: files, cache and buffers (memory); the runtime too (process); only files.",
    ),
]
Format = Annotated[str | None, typer.Option("--format", "-f", help="Target: gguf or onnx.")]
LayoutName = Annotated[str | None, typer.Option("--layout", help="Layout of the target; see  acip-export formats.")]
Types = Annotated[str, typer.Option("--types", help="Types to choose from, by comma. Default: the target's.")]
Context = Annotated[int | None, typer.Option(help="Tokens of KV cache. Default: the model's, at most 4096.")]
CacheType = Annotated[str | None, typer.Option(help="Type of the KV cache.")]
PromptBatch = Annotated[int | None, typer.Option(help="Prompt tokens processed together. Default: suits the budget.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line per tensor.")]
Text = Annotated[Path | None, typer.Option("--text", help="Text to measure perplexity on.")]


def plan_request(
    budget: str | None,
    scope: BudgetScope,
    format_: str | None,
    layout: str | None,
    types: str,
    context: int | None,
    cache_type: str | None,
    prompt_batch: int | None,
) -> PlanRequest:
    from acip_export.plan import PlanRequest

    if budget is None:
        raise UsageError("no budget; give one with  --budget 4GB")
    if format_ is None:
        raise UsageError(f"no target; choose one with  --format {'|'.join(TARGETS)}")
    if prompt_batch is not None and prompt_batch < 1:
        raise UsageError(f"--prompt-batch {prompt_batch} must be at least 1")
    names = tuple(name.strip().lower() for name in types.split(",") if name.strip())
    return PlanRequest(
        target=format_,
        budget_bytes=parse_bytes(budget),
        budget_scope=scope,
        layout=layout,
        types=names,
        context=context,
        cache_type=cache_type,
        prompt_batch=prompt_batch,
    )
