"""The rows that the page and the model card share: what was planned, what was found. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import PurePath
from typing import Any

from acip_export.inspection.anatomy import fact
from acip_export.report.page import Exported, Page, positive
from acip_export.units import format_bytes

_NONE = "–"


@dataclass(frozen=True)
class Row:
    """One line of a table: what, as planned or expected, as found; ``note`` is small print."""

    what: str
    planned: str
    found: str
    note: str = ""


def file_rows(export: Exported) -> list[Row]:
    """Bytes and structure; without a report only what was planned."""
    plan, report = export.plan, export.report
    written = report.get("written_bytes")
    rows = [
        Row(
            "Files, bytes",
            f"{plan.planned_bytes:,}",
            _NONE if written is None else f"{written:,}",
            "" if written is None else "equal" if written == plan.planned_bytes else "not equal",
        )
    ]
    structure = report.get("structure")
    if structure:
        rows.append(Row("Tensors as planned", f"{structure['tensors']:,}", f"{structure['found']:,}"))
    return rows


def runtime_rows(page: Page, runtime: Mapping[str, Any]) -> list[Row]:
    """What one runtime was found to do; a figure that was not measured has no row."""
    return [
        *_memory(runtime),
        *_quality(page, runtime),
        *_agreement(runtime.get("agreement") or {}),
        *_speed(runtime),
    ]


def _memory(runtime: Mapping[str, Any]) -> Iterator[Row]:
    memory = runtime.get("memory") or {}
    if (peak := _number(memory.get("peak_bytes"))) is None:
        return
    predicted = _number(memory.get("predicted_bytes"))
    within = memory.get("within_budget")
    fits = "" if within is None else "within the budget" if within else "above the budget"
    yield Row("Peak memory of a process", _bytes(predicted), _bytes(peak), fits)


def _quality(page: Page, runtime: Mapping[str, Any]) -> Iterator[Row]:
    own = positive(runtime.get("perplexity"))
    if own is not None:
        values = runtime["perplexity"]
        predicted = page.predicted(page.sizes[page.own_size])
        dense = "" if page.dense_perplexity is None else f"dense model: {page.dense_perplexity:.3f}; "
        error = _number(values.get("standard_error"))
        yield Row(
            "Perplexity",
            _NONE if predicted is None else f"{predicted:.3f}",
            f"{own:.3f}" + ("" if error is None else f" ± {own * error:.3f}"),
            f"{dense}{values.get('tokens', 0):,} tokens",
        )
    divergence = runtime.get("divergence") or {}
    if (difference := _number(divergence.get("loss_difference"))) is not None:
        found = f"{difference:+.4f}{_plus_minus(divergence.get('loss_difference_standard_error'))}"
        yield Row("Loss above the dense model", f"{page.own.plan.predicted_loss:+.4f}", found, page.own.plan.loss_unit)
    if (kl := _number(divergence.get("mean_kl"))) is not None:
        found = f"{kl:.4f}{_plus_minus(divergence.get('kl_standard_error'))}"
        same = _number(divergence.get("same_top"))
        note = "" if same is None else f"the most likely token is the same at {same:.1%} of the positions"
        yield Row("KL divergence from the dense model", _NONE, found, note)
    similarity = _number(page.own.report.get("similarity"))
    if similarity is not None:
        yield Row("Similarity to the dense model's embeddings", _NONE, f"{similarity:.4f}")


def _agreement(agreement: Mapping[str, Any]) -> Iterator[Row]:
    """With the bundle, the reference that was converted."""
    if (kl := _number(agreement.get("mean_kl"))) is not None:
        largest = _number(agreement.get("max_logit_difference"))
        note = "" if largest is None else f"largest difference of a logit: {largest:.2g}"
        yield Row("KL divergence from the bundle", _NONE, f"{kl:.1e}", note)
    if agreement.get("greedy_tokens"):
        found = f"{agreement.get('greedy_equal', 0)} of {agreement['greedy_tokens']}"
        yield Row("Greedy tokens as the bundle's", _NONE, found, "before the first one that differs")


def _speed(runtime: Mapping[str, Any]) -> Iterator[Row]:
    speed = runtime.get("speed") or {}
    for key, what in (("prefill", "Prompt, tokens per second"), ("decode", "Generation, tokens per second")):
        if (value := _number(speed.get(key))) is not None:
            yield Row(what, _NONE, f"{value:,.0f}")
    if (seconds := _number(runtime.get("load_seconds"))) is not None:
        yield Row("Load time", _NONE, f"{seconds:.2f} s")


def provenance(page: Page) -> dict[str, str]:
    """Where it all came from, as words by name; hashes in full, for a machine to compare."""
    plan, report, ranking = page.own.plan, page.own.report, page.ranking
    made = report.get("provenance") or {}
    serving = plan.serving
    pairs: dict[str, object] = {
        "Base model": plan.model,
        "Model fingerprint": plan.model_fingerprint,
        "Score file, SHA-256": plan.scores_sha256,
    }
    if ranking is not None:
        settings = {k: v for k, v in ranking.algorithm.items() if k not in ("name", "basis")}
        pairs |= {
            "Ranked by": f"{ranking.algorithm.get('name', '?')}, basis {ranking.algorithm.get('basis', '?')}",
            "Ranking settings": _pairs(settings),
            "Calibration data": _pairs(ranking.data),
            "Ranked with": _pairs(ranking.versions),
        }
    pairs |= {
        "Budget": f"{format_bytes(plan.budget_bytes)} ({plan.budget_bytes:,} bytes) of {plan.budget_scope}",
        "Settings the budget holds for": (
            f"{serving.context} tokens of context, KV cache {serving.cache_type}, "
            f"prompts in batches of {serving.prompt_batch}"
        ),
        "Bundle, SHA-256": made.get("bundle_weights_sha256"),
        "Made with": made.get("tool"),
        "Measured with": _pairs(report.get("versions") or {}),
        "Measured on": _pairs(report.get("machine") or {}),
        "Text": _pairs(report.get("text") or {}),
    }
    pairs |= {
        f"{fact(file.get('name', '?'))}, SHA-256": file.get("sha256")
        for file in report.get("files") or ()
        if isinstance(file, Mapping)
    }
    return {key: _fact(value) for key, value in pairs.items() if value}


def _pairs(values: Mapping[str, Any]) -> str:
    """A report is for others: of the path of a text they get its name."""
    shown = {key: PurePath(str(value)).name if key == "source" else value for key, value in values.items()}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items() if value is not None)


def _fact(value: object) -> str:
    """Printable, and whole: settings of a ranking are long."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def _plus_minus(error: object) -> str:
    number = _number(error)
    return "" if number is None else f" ± {number:.4f}"


def _bytes(count: float | None) -> str:
    return _NONE if count is None else format_bytes(round(count))


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return float(value) if usable and isinstance(value, int | float) else None
