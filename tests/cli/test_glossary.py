"""docs/glossary.md, the commands' flags and the artifacts' keys use the same words."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import typer.main

from acip_export.artifacts.plan import Plan, Serving, TensorDecision
from acip_export.artifacts.report import Report
from acip_export.cli.main import app

GLOSSARY = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8")
KINDS = {"plan": Plan, "serving": Serving, "tensor": TensorDecision, "report": Report}
KEYS = {f"{kind}.{field.name}" for kind, schema in KINDS.items() for field in fields(schema)}


def flags() -> set[str]:
    group = typer.main.get_command(app)
    commands = [group, *getattr(group, "commands", {}).values()]
    return {
        name for command in commands for option in command.params for name in (*option.opts, *option.secondary_opts)
    }


def rows(title: str) -> list[list[str]]:
    lines = [line for line in GLOSSARY.split(title)[1].split("## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_flags_and_keys_of_the_glossary_exist() -> None:
    known = flags()
    for word, _, named_flags, named_keys in rows("# Words\n"):
        for flag in re.findall(r"`([^`]+)`", named_flags):
            assert flag in known, f"{word}: no command has {flag}"
        for key in re.findall(r"`([^`]+)`", named_keys):
            assert key in KEYS, f"{word}: no artifact has {key}"


def test_words_that_are_not_used_are_not_used() -> None:
    single = {row[0] for row in rows("## Words that are not used\n") if re.fullmatch(r"[a-z]+", row[0])}
    assert {"target", "execution"} <= single
    words = {part for name in flags() for part in name.strip("-").split("-")}
    words |= {part for key in KEYS for part in key.split(".")[1].split("_")}
    assert not words & single
