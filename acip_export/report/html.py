"""``report.html``: one file without any request. Pure.

What does not move with the slider is written here, so that it is readable without JavaScript; report.js draws the rest
from the embedded JSON. The page's own policy allows exactly the two inline blocks that it was written with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from typing import Any

from acip_export.artifacts.report import Report, TaskMetric
from acip_export.formats.protocol import RunCommand
from acip_export.report.page import Page
from acip_export.report.rows import Row, file_rows, provenance, runtime_rows
from acip_export.units import format_bytes
from acip_export.version import __version__

_SLOT = re.compile(r"\{\{(\w+)\}\}")


def render(page: Page, commands: Iterable[RunCommand]) -> str:
    """The page; ``commands`` run the export."""
    plan, report = page.own.plan, page.own.report
    style, script = (_part(name) for name in ("report.css", "report.js"))
    scope = {
        "file": "files",
        "memory": "memory",
        "process": "memory, the process included",
        "anonymous": "memory that the system cannot drop",
    }[plan.budget_scope]
    parts = {
        "policy": (
            f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        ),
        "title": escape(f"{plan.model} · {format_bytes(plan.planned_bytes)} · acip-export"),
        "style": style,
        "script": script,
        "model": escape(_clean(plan.model)),
        "subtitle": escape(
            f"{plan.format}, {plan.layout} layout, for {format_bytes(plan.budget_bytes)} of {scope} "
            f"at {plan.serving.context} tokens"
        ),
        "verdict": _verdict(report),
        "measured": _measured(page),
        "run": _run(commands),
        "provenance": _provenance(provenance(page)),
        "footer": escape(f"acip-export {__version__}"),
        "data": _island(page.data().to_json()),
    }
    # One pass: what is put in is never looked at again.
    return _SLOT.sub(lambda slot: parts[slot[1]], _part("template.html"))


def _part(name: str) -> str:
    return files("acip_export.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _island(data: Any) -> str:
    """JSON that no HTML parser can take for the end of its element, or for a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _verdict(report: Report | None) -> str:
    if report is None:
        text = "planned and written, but not verified in a runtime; run  acip-export verify"
        return f'<p class="notice"><strong>Not measured:</strong> {escape(text)}</p>'
    notes = "".join(f"<li>{escape(_clean(note))}</li>" for note in report.notes)
    if report.passed:
        names = ", ".join(runtime.runtime for runtime in report.runtimes)
        text = f"the files are byte for byte as planned, and were run in {names or 'no runtime'}."
        listed = f"<ul>{notes}</ul>" if notes else ""
        return f'<div class="notice good"><strong>Verified:</strong> {escape(_clean(text))}{listed}</div>'
    failures = "".join(f"<li>{escape(_clean(failure))}</li>" for failure in report.failures)
    return f'<div class="notice bad"><strong>Not as planned</strong><ul>{failures}{notes}</ul></div>'


def _measured(page: Page) -> str:
    report = page.own.report
    groups: list[tuple[str, list[Row]]] = [("", file_rows(page.own))]
    if report is not None:
        groups += [(runtime.runtime, runtime_rows(page, report, runtime)) for runtime in report.runtimes]
    lines = ["<table>", "<thead><tr><th></th><th>planned</th><th>measured</th></tr></thead>", "<tbody>"]
    for name, rows in groups:
        if name:
            lines.append(f'<tr class="runtime"><th colspan="3" scope="colgroup">{escape(_clean(name))}</th></tr>')
        for row in rows:
            note = f"<small>{escape(_clean(row.note))}</small>" if row.note else ""
            cells = f"<td>{escape(row.planned)}</td><td>{escape(row.found)}</td>"
            lines.append(f'<tr><th scope="row">{escape(row.what)}{note}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody>", "</table>", _tasks(report.tasks if report is not None else None)])


def _tasks(tasks: Mapping[str, Mapping[str, TaskMetric]] | None) -> str:
    if not tasks:
        return ""
    lines = ["<h3>Tasks, on the bundle</h3>", "<table>", "<tbody>"]
    for task, metrics in tasks.items():
        for metric, result in metrics.items():
            error = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
            found = f"{result.value:.4f}{error}"
            lines.append(f'<tr><th scope="row">{escape(_clean(f"{task}, {metric}"))}</th><td>{escape(found)}</td></tr>')
    return "\n".join([*lines, "</tbody>", "</table>"])


def _run(commands: Iterable[RunCommand]) -> str:
    blocks: list[str] = []
    for command in commands:
        note = f'<p class="caption">{escape(command.note)}</p>' if command.note else ""
        summary = f"<summary>{escape(command.program)}</summary>"
        code = f"<pre><code>{escape(command.text)}</code></pre>"
        blocks.append(f"<details{'' if blocks else ' open'}>{summary}{code}{note}</details>")
    return "\n".join(['<p class="caption">In the directory of the export:</p>', *blocks])


def _provenance(pairs: Mapping[str, str]) -> str:
    lines = []
    for key, value in pairs.items():
        text = f"<code>{escape(value)}</code>" if "SHA-256" in key or "fingerprint" in key else escape(value)
        lines.append(f"<dt>{escape(key)}</dt><dd><bdi>{text}</bdi></dd>")
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"
