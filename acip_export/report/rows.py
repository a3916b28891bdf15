"""The rows that the page and the model card share: what was planned, what was found. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from acip_export.artifacts.plan import Plan
from acip_export.artifacts.report import Report, RuntimeReport
from acip_export.devices import THIS_MACHINE
from acip_export.inspection.anatomy import fact
from acip_export.io.inputs import builtins
from acip_export.report.page import Exported, Page
from acip_export.units import format_bytes, format_nats, format_speed

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
    planned, report = export.plan.planned_bytes, export.report
    if report is None:
        return [Row("Files, bytes", f"{planned:,}", _NONE)]
    same = "equal" if report.written_bytes == planned else "not equal"
    rows = [Row("Files, bytes", f"{planned:,}", f"{report.written_bytes:,}", same)]
    if report.structure is not None:
        rows.append(Row("Tensors as planned", f"{report.structure.tensors:,}", f"{report.structure.found:,}"))
    return rows


def runtime_rows(page: Page, report: Report, runtime: RuntimeReport) -> list[Row]:
    """What one runtime was found to do; a figure that was not measured has no row."""
    return [
        *_memory(runtime),
        *_quality(page, report, runtime),
        *_agreement(runtime),
        *_speed(runtime, page.own.plan),
    ]


def _memory(runtime: RuntimeReport) -> Iterator[Row]:
    memory = runtime.memory
    if memory is not None:
        fits = {None: "", True: "within the budget", False: "above the budget"}[memory.within_budget]
        yield Row(
            "Peak memory of a process", format_bytes(memory.predicted_bytes), format_bytes(memory.peak_bytes), fits
        )


def _quality(page: Page, report: Report, runtime: RuntimeReport) -> Iterator[Row]:
    own, divergence = runtime.perplexity, runtime.divergence
    if own is not None:
        predicted = page.predicted(page.sizes[page.own_size])
        dense = "" if page.dense_perplexity is None else f"dense model: {page.dense_perplexity:.3f}; "
        yield Row(
            "Perplexity",
            _NONE if predicted is None else f"{predicted:.3f}",
            f"{own.perplexity:.3f} ± {own.perplexity * own.standard_error:.3f}",
            f"{dense}{_text(report, own.tokens)}",
        )
    if divergence is not None:
        yield Row(
            "Loss above the dense model",
            f"{page.own.plan.predicted_loss:+.4f}",
            f"{divergence.loss_difference:+.4f} ± {divergence.loss_difference_standard_error:.4f}",
            f"{page.own.plan.loss_unit}; predicted on the text that the ranking held out",
        )
        yield Row(
            "KL divergence from the dense model",
            _NONE if report.predicted_divergence is None else format_nats(report.predicted_divergence),
            f"{format_nats(divergence.mean_kl)} ± {format_nats(divergence.kl_standard_error)}",
            f"nats per token; 99.9 % of the positions: at most {format_nats(divergence.kl_999)}",
        )
        yield Row(
            "Same most likely token as the dense model", _NONE, f"{divergence.same_top:.1%}", "share of the positions"
        )
    if report.similarity is not None:
        yield Row("Similarity to the dense model's embeddings", _NONE, f"{report.similarity:.4f}")


def _text(report: Report, tokens: int) -> str:
    return f"{tokens:,} tokens" + ("" if report.text is None else f" of {report.text.source}")


def _agreement(runtime: RuntimeReport) -> Iterator[Row]:
    """With the bundle, the reference that was converted."""
    agreement = runtime.agreement
    if agreement is None:
        return
    note = f"largest difference of a logit: {agreement.max_logit_difference:.2g}; {agreement.positions:,} positions"
    yield Row("Agreement with the bundle, nats", _NONE, f"{agreement.mean_kl:.1e}", note)
    if agreement.greedy_tokens:
        equal = f"{agreement.greedy_equal} of {agreement.greedy_tokens}"
        yield Row("Greedy tokens as the bundle's", _NONE, equal, "before the first one that differs")
    tokens = runtime.tokens
    if tokens is not None:
        same = f"{tokens.texts - len(tokens.different)} of {tokens.texts}"
        yield Row("Strings with the tokens of transformers", _NONE, same, "plain text, scripts, blanks and signs")


def _speed(runtime: RuntimeReport, plan: Plan) -> Iterator[Row]:
    speed, planned = runtime.speed, plan.speed
    # A runtime's name here is followed by its version, or by how it is called.
    known = planned if planned is not None and runtime.runtime.split()[0] == planned.runtime else None
    elsewhere = known is not None and plan.device not in (None, THIS_MACHINE)
    note = f"predicted for {plan.device}, found here" if elsewhere else ""
    if speed is not None:
        prompt = _NONE if known is None or known.prompt is None else format_speed(known.prompt, known.prompt_error)
        yield Row("Prompt, tokens per second", prompt, f"{speed.prefill:,.0f}", "" if prompt == _NONE else note)
    if speed is not None and speed.decode is not None:
        answer = _NONE if known is None else format_speed(known.answer, known.answer_error)
        yield Row("Generation, tokens per second", answer, f"{speed.decode:,.0f}", note)
    if runtime.load_seconds is not None:
        yield Row("Load time", _NONE, f"{runtime.load_seconds:.2f} s")


def provenance(page: Page) -> dict[str, str]:
    """Where it all came from, as words by name; hashes in full, for a machine to compare."""
    plan, report, ranking = page.own.plan, page.own.report, page.ranking
    serving = plan.serving
    pairs: dict[str, object] = {
        "Base model": plan.model,
        "Model fingerprint": plan.model_fingerprint,
        "Score file, SHA-256": plan.scores_sha256,
    }
    if ranking is not None:
        settings = {k: v for k, v in ranking.algorithm.items() if k not in ("name", "basis")}
        pairs |= {
            "Ranked by": f"{ranking.algorithm['name']}, basis {ranking.algorithm['basis']}",
            "Ranking settings": _pairs(settings),
            "Calibration data": _pairs(builtins(ranking.data)),
            "Ranked with": _pairs(ranking.versions),
        }
    pairs |= {
        "Budget": f"{format_bytes(plan.budget_bytes)} ({plan.budget_bytes:,} bytes) of {plan.budget_scope}",
        "Settings the budget holds for": (
            f"{serving.context} tokens of context, KV cache {serving.cache_types}, "
            f"prompts in batches of {serving.prompt_batch}"
        ),
    }
    if report is not None:
        pairs |= {
            "Made with": report.provenance.tool,
            "Measured with": _pairs(report.versions),
            "Measured on": _pairs(report.machine),
            "Text": "" if report.text is None else _pairs(builtins(report.text)),
        }
        pairs |= {f"{fact(file.name)}, SHA-256": file.sha256 for file in report.files}
    return {key: _fact(value) for key, value in pairs.items() if value}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items() if value is not None)


def _fact(value: object) -> str:
    """Printable, and whole: settings of a ranking are long."""
    return "".join(c if c.isprintable() else " " for c in str(value))
