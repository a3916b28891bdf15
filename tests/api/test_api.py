from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import acip_export
from acip_export import errors
from samples import demo
from samples.marked import marked

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", acip_export.__all__)
def test_exported_names_exist_and_are_documented(name: str) -> None:
    value = getattr(acip_export, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = acip_export.nothing


def test_import_is_lean() -> None:
    code = "import acip_export, sys; assert not {'torch', 'numpy', 'typer', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_error_has_its_documented_exit_code() -> None:
    documented = {match[1]: int(match[2]) for match in re.finditer(r"── (\w+) +(\d)", inspect.getdoc(errors) or "")}
    classes = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.AcipError) and errors.AcipError in value.__bases__
    }
    assert documented == classes


def test_the_table_of_the_samples_is_the_demos() -> None:
    """The table is generated; a stale or hand-made one fails."""
    record = json.loads((ROOT / "benchmarks" / "demo.json").read_text())
    readme = (ROOT / "samples" / "README.md").read_text(encoding="utf-8")
    assert marked(readme, demo.TABLE) == demo.table(record["rows"])
    assert all(row["planned_bytes"] == row["written_bytes"] for row in record["rows"])
    assert all(row["memory_bytes"] <= row["budget_bytes"] for row in record["rows"])


def test_no_path_of_a_developers_machine() -> None:
    """Docs and code name no absolute path of the machine they were written on."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    offenders = []
    for name in tracked:
        file = ROOT / name
        if file.suffix in {".py", ".md", ".toml", ".json", ".txt", ".cff"} and "samples/text" not in name:
            text = file.read_text(encoding="utf-8")
            if re.search(r"(?<![\w.])/(home|root|work|Users)/\w", text):
                offenders.append(name)
    assert offenders == []
