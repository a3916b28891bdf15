"""The verdicts for machines: JSON, JUnit XML, and annotations of GitHub's workflow commands. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from acip_export.artifacts.names import CHECK
from acip_export.check.compare import Result
from acip_export.check.run import Outcome
from acip_export.io.outputs import FileKind

_SUITE = "acip-export check"
JUNIT_KIND = FileKind("JUnit XML", re.compile(rb'<\?xml [^>]*>\s*<testsuites name="%b"' % _SUITE.encode()))


def check_json(outcome: Outcome) -> dict[str, Any]:
    """The document of ``check --json``; see docs/check.md."""
    return {
        "artifact": CHECK.artifact,
        "version": CHECK.version,
        "config": outcome.config,
        "baseline": outcome.source,
        "passed": outcome.passed,
        "updated": outcome.updated,
        "results": [_result_json(result) for result in outcome.results],
    }


def _result_json(result: Result) -> dict[str, Any]:
    data = dataclasses.asdict(result)
    for raw, change in zip(data["changes"], result.changes, strict=True):
        raw["delta"] = change.delta
    return {**data, "delta": result.delta}


def junit(outcome: Outcome) -> str:
    """JUnit XML as Jenkins, GitLab and GitHub's reporters read it: one suite, one test case an entry.

    A broken limit is a ``failure``; what could not be checked is an ``error``.
    """
    errors = [result for result in outcome.failed if any(problem.broken for problem in result.problems)]
    counts = {
        "tests": len(outcome.results),
        "failures": len(outcome.failed) - len(errors),
        "errors": len(errors),
        "skipped": sum(result.status == "skipped" for result in outcome.results),
    }
    attributes = {"name": _SUITE, **{key: str(value) for key, value in counts.items()}, "time": "0"}
    suites = ElementTree.Element("testsuites", {k: v for k, v in attributes.items() if k != "skipped"})
    suite = ElementTree.SubElement(suites, "testsuite", attributes)
    for result in outcome.results:
        case = ElementTree.SubElement(
            suite, "testcase", {"name": result.name, "classname": _SUITE, "file": result.path, "time": "0"}
        )
        if result.problems:
            # One element a case: consumers disagree on several.
            broken = any(problem.broken for problem in result.problems)
            element = ElementTree.SubElement(
                case,
                "error" if broken else "failure",
                {"message": _xml(result.problems[0].message), "type": result.problems[0].rule},
            )
            element.text = _xml("\n".join(f"{problem.rule}: {problem.message}" for problem in result.problems))
        elif result.status == "skipped":
            ElementTree.SubElement(case, "skipped", {"message": _xml("; ".join(result.notes))})
        if result.changes:
            lines = (f"{change.delta:+d} {change.name} ({change.what})" for change in result.changes)
            ElementTree.SubElement(case, "system-out").text = _xml("\n".join(lines))
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold in any form."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def github_annotations(outcome: Outcome) -> Iterator[str]:
    """Lines that GitHub Actions shows on the configuration's file: errors, and notices for what may be tightened."""
    for result in outcome.results:
        for problem in result.problems:
            yield _annotation("error", outcome.config, f"{result.name}: {problem.rule}", problem.message)
        for note in result.notes:
            yield _annotation("notice", outcome.config, result.name, note)


def _annotation(level: str, file: str, title: str, message: str) -> str:
    """Escaped as github.com/actions/toolkit does (packages/core, command.ts)."""

    def data(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    def value(text: str) -> str:
        return data(text).replace(":", "%3A").replace(",", "%2C")

    return f"::{level} file={value(file)},title={value(title)}::{data(message)}"
