"""The verdicts as one comment on a pull request. Names come from files that anybody may have written, so none of them
may become markup, a link or a mention.
"""

from __future__ import annotations

import html
import re

from acip_export.check.compare import Result, signed
from acip_export.check.run import Outcome
from acip_export.inspection.diff import TensorChange
from acip_export.io.outputs import FileKind
from acip_export.markdown import code, plain
from acip_export.units import format_bytes

# A later run finds its own comment by this line and replaces it.
MARKER = "<!-- acip-export check -->"
COMMENT_KIND = FileKind("a comment of a check", re.compile(MARKER.encode()))

# GitHub refuses comments of more than 65,536 characters.
_LONGEST = 60_000
_MOST_CHANGES = 40
_ICONS = {"ok": "✅", "failed": "❌", "skipped": "⏭️"}


def markdown(outcome: Outcome) -> str:
    """The whole comment, at most 60,000 characters; per-tensor tables are left out first."""
    head = [
        MARKER,
        f"### {_ICONS['ok' if outcome.passed else 'failed']} Model size: {summary(outcome)}",
        "",
        *_table(outcome),
    ]
    for result in outcome.results:
        head += [f"- {code(result.name)}: {plain(problem.message)}" for problem in result.problems]
        head += [f"- {code(result.name)}: {plain(note)}" for note in result.notes]
    text = "\n".join(head) + "\n"
    if len(text) > _LONGEST:
        return f"{text[: text.rindex(chr(10), 0, _LONGEST)]}\n\n…\n"
    for result in outcome.results:
        details = _details(result)
        if len(text) + len(details) > _LONGEST:
            return f"{text}\nMore changes are in the check's own output.\n"
        text += details
    return text


def summary(outcome: Outcome) -> str:
    """``1 of 3 checks failed``."""
    total, failed = len(outcome.results), len(outcome.failed)
    skipped = sum(result.status == "skipped" for result in outcome.results)
    checks = "1 check" if total == 1 else f"{total} checks"
    text = f"{failed} of {checks} failed" if failed else f"{checks} passed"
    return f"{text}, {skipped} skipped" if skipped else text


def _table(outcome: Outcome) -> list[str]:
    rows = [
        "| | check | size | baseline | change | limit | quality kept |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in outcome.results:
        cells = [
            _ICONS[result.status],
            code(result.name),
            _size(result.total_bytes),
            _size(result.baseline_bytes),
            result.change,
            _size(result.limit_bytes),
            "" if result.recovery is None else f"{result.recovery:.2%}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def _size(count: int | None) -> str:
    return "" if count is None else format_bytes(count)


def _details(result: Result) -> str:
    if not result.changes:
        return ""
    number = "1 change" if len(result.changes) == 1 else f"{len(result.changes)} changes"
    lines = [
        "",
        f"<details><summary>{number} in <code>{html.escape(result.name, quote=False)}</code></summary>",
        "",
        "| tensor | was | is | change | |",
        "| --- | ---: | ---: | ---: | --- |",
        *(_change(change) for change in result.changes[:_MOST_CHANGES]),
    ]
    if len(result.changes) > _MOST_CHANGES:
        lines.append(f"| and {len(result.changes) - _MOST_CHANGES} more | | | | |")
    return "\n".join([*lines, "", "</details>", ""])


def _change(change: TensorChange) -> str:
    before = "" if change.before is None else format_bytes(change.before.nbytes)
    after = "" if change.after is None else format_bytes(change.after.nbytes)
    return f"| {code(change.name)} | {before} | {after} | {signed(change.delta)} | {plain(change.what)} |"
