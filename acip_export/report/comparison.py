"""``comparison.html``: exports of one model at several budgets side by side: sizes, quality, speed, and differences.

One file that makes no request and runs no script. Every figure is of the exports' ``plan.json`` and ``report.json``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from acip_export.artifacts.export_directory import COMPARISON_KIND
from acip_export.artifacts.names import COMPARISON_FILE
from acip_export.artifacts.plan import Plan, TensorDecision
from acip_export.io.outputs import claim_output
from acip_export.report.page import Exported, read_export
from acip_export.units import format_bytes, format_nats

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_NONE = "–"


def write_comparison(exports: Sequence[Path]) -> Path:
    """Write ``comparison.html`` beside exports of one directory, in place of an earlier one, and return where it is.

    Raises:
        PlanFileError, InputError: a plan or report is damaged. UsageError: the place is somebody else's.
    """
    file = exports[0].parent / COMPARISON_FILE
    page = render({export.name: read_export(export) for export in exports})
    with claim_output(file, COMPARISON_KIND, True).new_file() as temporary:
        temporary.write_text(page, encoding="utf-8")
    return file


def render(exports: dict[str, Exported]) -> str:
    """Return the page; exports by the name of their directories."""
    plans = [export.plan for export in exports.values()]
    model = escape(plans[0].model)
    style = files("acip_export.report").joinpath("report.css").read_text(encoding="utf-8")
    names = [f'<a href="{escape(name)}/report.html">{escape(name)}</a>' for name in exports]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{model} · exports compared · acip-export</title>\n<style>{style}</style>\n</head>\n<body>",
            f'<header class="top"><div><p class="eyebrow">Exports compared</p><h1><bdi>{model}</bdi></h1>',
            f'<p class="subtitle">{len(exports)} exports, {escape(plans[0].format)}</p></div></header>\n<main>',
            '<section class="card"><h2>Sizes, quality and speed</h2>',
            *_table(["", *names], [(what, *cells) for what, cells in _figures(list(exports.values()))]),
            '</section>\n<section class="card"><h2>Where they differ</h2>',
            '<p class="caption">What becomes of each tensor, where it is not the same in all of them.</p>',
            *_table(["", *names], list(_differences(plans))),
            "</section>\n</main>\n</body>\n</html>\n",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """``head`` is markup, cells are text."""
    yield '<div style="overflow-x:auto"><table>'
    yield f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>\n<tbody>"
    for what, *cells in rows:
        found = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        yield f'<tr><th scope="row">{escape(what)}</th>{found}</tr>'
    yield "</tbody></table></div>"


def _figures(exports: Sequence[Exported]) -> Iterator[tuple[str, list[str]]]:
    """Rows of figures; a figure that none of the exports has is no row."""
    yield "Budget", [f"{format_bytes(each.plan.budget_bytes)} of {each.plan.budget_scope}" for each in exports]
    yield "Files, bytes", [f"{each.plan.planned_bytes:,}" for each in exports]
    yield (
        "Predicted perplexity, on the text that the ranking held out",
        [_number(each.plan.predicted_perplexity) for each in exports],
    )
    reports = [each.report for each in exports]
    firsts = [report.runtimes[0] if report is not None and report.runtimes else None for report in reports]
    if not any(firsts):
        return
    own = [None if each is None or each.memory is None else each.memory.peak_bytes for each in firsts]
    yield "Memory of a process", [_NONE if each is None else format_bytes(each) for each in own]
    own_loss = [None if each is None or each.perplexity is None else each.perplexity.perplexity for each in firsts]
    dense = [
        None if each is None or each.dense_perplexity is None else each.dense_perplexity.perplexity for each in reports
    ]
    texts = [None if each is None or each.text is None else each.text.source for each in reports]
    yield "Measured on", [_NONE if each is None else each for each in texts]
    yield "Perplexity", [_number(each) for each in own_loss]
    yield "of the dense model", [_number(each) for each in dense]
    far = [None if each is None else each.divergence for each in firsts]
    yield "KL from the dense model, nats", [_NONE if each is None else format_nats(each.mean_kl) for each in far]
    yield "KL, 99.9 % below, nats", [_NONE if each is None else format_nats(each.kl_999) for each in far]
    yield "Same most likely token", [_NONE if each is None else f"{each.same_top:.1%}" for each in far]
    speeds = [None if each is None else each.speed for each in firsts]
    yield "Prompt, tokens/s", [_NONE if each is None else f"{each.prefill:,.0f}" for each in speeds]
    yield (
        "Generation, tokens/s",
        [_NONE if not each or each.decode is None else f"{each.decode:,.0f}" for each in speeds],
    )


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.2f}"


def _differences(plans: Sequence[Plan]) -> Iterator[tuple[str, ...]]:
    """Tensors that the plans decide differently, in the model's order."""
    for decisions in zip(*(plan.tensors for plan in plans), strict=True):
        cells = tuple(_decision(each) for each in decisions)
        if len(set(cells)) > 1:
            yield (decisions[0].name.removesuffix(".weight"), *cells)


def _decision(decision: TensorDecision) -> str:
    """What becomes of a tensor, in a few words."""
    types = decision.type or f"{decision.up_type} × {decision.down_type}"
    return types if decision.rank is None else f"{types}, rank {decision.rank}"
