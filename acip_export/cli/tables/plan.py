"""Print a plan: where the bytes of its budget go, and what becomes of the tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import isclose
from typing import TYPE_CHECKING

from rich.table import Table

from acip_export.cli import output as console
from acip_export.cli.tables.common import facts_table, plain_table
from acip_export.model.tensor_names import within_layer
from acip_export.units import format_bytes, format_error, format_speed

if TYPE_CHECKING:
    from acip_export.artifacts.plan import Plan, TensorDecision

# What is measured of an export may be of another text: a --text, or so many tokens of this one as take a minute.
_PREDICTED_ON = "on the text that the ranking held out"
# Share of a budget that is worth a sentence where nothing is left to improve.
_UNNEEDED = 0.05
# A divergence within this share of the predicted loss is not shown beside it.
_SAME = 0.02


def show_plan(plan: Plan, verbose: bool) -> None:
    """What is wrong with it; the budget, where its bytes go, and what was chosen, folded by kind of layer."""
    if plan.far_off is not None:
        console.say(plan.far_off, style="bold red")
        for other in plan.certificate.alternatives:
            console.say(f"{_quality(other.predicted_perplexity, other.predicted_loss)} with  {other.change}", indent=2)
        console.say("an export needs  --accept-loss\n", indent=2)
    table = facts_table(f"{plan.model} → {plan.format} ({plan.layout})")
    table.add_row("budget", format_bytes(plan.budget_bytes), f"{plan.budget_bytes:,} bytes of {plan.budget_scope}")
    for name, size in plan.breakdown.items():
        if size == 0:
            continue
        table.add_row(f"  {name.replace('_', ' ')}", format_bytes(size), _in_budget(size, plan.counted(name)))
    used = plan.used_bytes
    table.add_row("used", format_bytes(used), f"{used / plan.budget_bytes:.2%} of the budget")
    table.add_row("left", format_bytes(plan.certificate.bytes_left), _upgrade(plan))
    table.add_row("files", format_bytes(plan.planned_bytes), f"{plan.size_ratio:.3f} of the dense model's bytes")
    loss, least = plan.predicted_loss, plan.certificate.lower_bound
    if plan.predicted_perplexity is not None:
        quality = f"dense {plan.dense_perplexity:,.2f}; {loss:.4f} {plan.loss_unit} more (at least {least:.4f})"
        table.add_row("predicted perplexity", f"{plan.predicted_perplexity:,.2f}", f"{quality}, {_PREDICTED_ON}")
        apart = plan.predicted_divergence
        if apart is not None and not isclose(apart, loss, rel_tol=_SAME):
            why = ": adapters learn their text" if plan.adapters else ""
            table.add_row("predicted KL", f"{apart:.4f}", f"{plan.loss_unit} from the dense model{why}")
    else:
        quality = f"{plan.loss_unit} (at least {least:.2e}), {_PREDICTED_ON}"
        table.add_row("predicted loss", f"{loss:.2e}", quality)
    serving = plan.serving
    table.add_row(
        "runtime",
        f"{serving.context} tokens",
        f"KV cache {serving.cache_types}, prompts in batches of {serving.prompt_batch}"
        if plan.task == "causal"
        else f"a text, {serving.prompt_batch} in a batch of texts",
    )
    if plan.speed is not None:
        speed = plan.speed
        error = f"{format_error(speed.answer_error)}, " if speed.answer_error else ""
        answer = f"{error}of an answer with a full context in {speed.runtime}"
        prompt = f"; {format_speed(speed.prompt, speed.prompt_error)} of a prompt as long" if speed.prompt else ""
        table.add_row("predicted speed", f"{format_speed(speed.answer)} tokens/s", answer + prompt)
    console.out.print(table)
    console.out.print()
    if len(plan.certificate.contexts) > 1:
        console.out.print(_context_table(plan))
        console.out.print()
    console.out.print(_tensor_table(plan) if verbose else _folded_table(plan))
    notes = (note for note in plan.notes if note != plan.far_off)
    for line in (*_unneeded(plan), *notes, *_held_back(plan, verbose)):
        console.say(f"• {line}")


def _unneeded(plan: Plan) -> Iterator[str]:
    """Say of a budget that the model cannot use up how much it can: no larger plan is predicted to lose less."""
    left, best = plan.certificate.bytes_left, plan.certificate.lower_bound
    as_good_as_any = plan.certificate.next_upgrade is None and isclose(plan.predicted_loss, best, abs_tol=1e-9)
    if as_good_as_any and left > _UNNEEDED * plan.budget_bytes:
        budget, used = format_bytes(plan.budget_bytes), format_bytes(plan.used_bytes)
        yield f"{budget} is more than this model needs: its best plan takes {used}, and no larger one is better"


def _in_budget(size: int, counted: int) -> str:
    """Say how much of a part of the memory the budget covers, where it is not all."""
    if counted == size:
        return ""
    return f"{format_bytes(counted)} of it in the budget" if counted else "not in the budget"


def show_plans(plans: Sequence[Plan]) -> None:
    """One line a plan, when there are several."""
    table = plain_table("budget", "used", "files", "predicted perplexity", "dense")
    for column in table.columns:
        column.justify = "right"
    for plan in plans:
        predicted, dense = plan.predicted_perplexity, plan.dense_perplexity
        table.add_row(
            format_bytes(plan.budget_bytes),
            format_bytes(plan.used_bytes),
            format_bytes(plan.planned_bytes),
            f"{plan.predicted_loss:.2e} {plan.loss_unit}" if predicted is None else f"{predicted:,.2f}",
            "" if dense is None else f"{dense:,.2f}",
        )
    console.out.print(table)
    console.say(f"predicted {_PREDICTED_ON}", style="dim")
    for line in (line for plan in plans for line in _unneeded(plan)):
        console.say(f"• {line}")


def _held_back(plan: Plan, verbose: bool) -> Iterator[str]:
    """Why the plan is not better: what else is in the budget, and what the format or its backend forbids."""
    own = _quality(plan.predicted_perplexity, plan.predicted_loss)
    for other in () if plan.far_off else plan.certificate.alternatives:
        better = _quality(other.predicted_perplexity, other.predicted_loss)
        if better == own:
            continue  # too little to be shown
        batch = other.change.startswith("--prompt-batch")
        part = sum(plan.breakdown[name] for name in (("compute", "output") if batch else ("kv_cache",)))
        what = "buffers take" if batch else "the KV cache takes"
        yield f"{what} {part / plan.budget_bytes:.0%} of the budget; predicted with  {other.change}:  {better}"
    by_tensors: dict[tuple[str, str], list[str]] = {}
    for refusal in plan.certificate.refused_types if verbose else ():
        which = refusal.example if refusal.tensors == 1 else f"{refusal.example} and {refusal.tensors - 1} more"
        by_tensors.setdefault((which, refusal.reason), []).append(refusal.type)
    for (which, reason), types in by_tensors.items():
        yield f"{which}: not {', '.join(types)} ({reason})"


def _quality(perplexity: float | None, loss: float) -> str:
    return f"loss {loss:.4f}" if perplexity is None else f"perplexity {perplexity:,.2f}"


def _upgrade(plan: Plan) -> str:
    if plan.certificate.next_upgrade is None:
        return "nothing left to improve"
    return f"next: {plan.certificate.next_upgrade} (+{format_bytes(plan.certificate.next_upgrade_bytes or 0)})"


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
            groups[within_layer(decision.module)].append(decision)
    table = plain_table("tensors", "n", "shape", "bytes", "what they become")
    for column in table.columns[:4]:
        column.no_wrap = column.header != "tensors"
    for name, members in groups.items():
        counts: dict[str, int] = defaultdict(int)
        for member in members:
            counts[_choice(member)] += 1
        chosen = ", ".join(choice if n == 1 else f"{n}x {choice}" for choice, n in counts.items())
        rows, columns = members[0].shape
        size = format_bytes(sum(member.nbytes for member in members))
        table.add_row(name, str(len(members)), f"{rows}x{columns}", size, chosen)
    return table


def _context_table(plan: Plan) -> Table:
    """What each doubling of the context costs under the same budget."""
    table = plain_table("context", "KV cache", "predicted", "the budget's plan with it")
    for cost in plan.certificate.contexts:
        loss = cost.predicted_loss
        quality = "-" if loss is None else _quality(cost.predicted_perplexity, loss)
        table.add_row(
            str(cost.context),
            format_bytes(cost.kv_cache),
            quality,
            "does not fit" if loss is None else f"{loss:.4f} {plan.loss_unit} above the dense model",
        )
    return table


def _tensor_table(plan: Plan) -> Table:
    table = plain_table("tensor", "shape", "bytes", "becomes")
    for decision in plan.tensors:
        shape = "x".join(str(extent) for extent in decision.shape)
        table.add_row(decision.name, shape, f"{decision.nbytes:,}", _choice(decision))
    return table
