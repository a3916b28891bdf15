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


def test_the_locked_environment_is_installed_where_it_holds() -> None:
    assert any(words[0] == "make" and "setup-locked" in words for words in map(shlex.split, _steps()))
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "tools/generate_lock.py --holds-here; then run setup-locked; else run setup; fi" in script
    # What an installation leaves is no older than what it is made from: no later target installs again.
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nsetup-locked:")[2].partition("\n\n")[0]
    assert recipe.rstrip().endswith("@touch $(STAMP)")


def test_forms_ask_for_something() -> None:
    for form in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        document = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.name != "config.yml":
            assert document["name"] and document["description"] and document["body"]
