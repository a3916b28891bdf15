"""The public workflow runs make targets that there are, and flags that the tool has."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from tests.test_command_lines import Line, problem_of

ROOT = Path(__file__).parent.parent
WORKFLOW = ".github/workflows/tests.yml"


def _steps() -> list[str]:
    document: dict[str, Any] = yaml.safe_load((ROOT / WORKFLOW).read_text(encoding="utf-8"))
    return [step["run"] for job in document["jobs"].values() for step in job["steps"] if "run" in step]


def test_every_step_can_be_typed() -> None:
    steps = [shlex.split(step) for step in _steps()]
    assert any(words[0] == "make" and {"lint", "type"} <= set(words) for words in steps)
    own = [words for words in steps if words[:3] != ["python", "-m", "pip"]]
    assert {problem_of(Line(WORKFLOW, tuple(words))) for words in own} == {None}


def test_forms_ask_for_something() -> None:
    for form in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        document = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.name != "config.yml":
            assert document["name"] and document["description"] and document["body"]
