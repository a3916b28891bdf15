"""The planner reads and writes no files and says nothing: its answers are values, which its callers put into words."""

from __future__ import annotations

import ast
from pathlib import Path

import acip_export.planning

FORBIDDEN = {"json", "logging", "os", "pathlib", "sys", "tomllib"}


def test_nothing_is_read_written_or_said() -> None:
    files = sorted(Path(str(acip_export.planning.__file__)).parent.glob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                modules = [module] if module else [alias.name for alias in node.names]
                assert not {name.split(".")[0] for name in modules} & FORBIDDEN, (file.name, modules)
                assert not any(name.startswith("acip_export.io") for name in modules), file.name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("open", "print"), (file.name, node.lineno)


def test_no_file_waits_for_another_to_be_imported() -> None:
    """Imports inside functions hide circles."""
    for file in Path(str(acip_export.planning.__file__)).parent.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inner = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
        assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in inner), file.name
