"""One tiny model of each architecture, and one export of each kind, for the whole session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acip_export.artifacts.bundle import Bundle
from acip_export.io.atomic import new_directory
from converters.gguf import converter
from tests.support import make_bundle, make_model, make_plan

Rule = Callable[[str, tuple[int, ...]], dict[str, Any]]
ARCHITECTURES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {arch: make_model(tmp_path_factory.mktemp("models") / arch, arch) for arch in ARCHITECTURES}


def export(model: Path, layout: str, rule: Rule, directory: Path, **options: Any) -> tuple[Bundle, Path]:
    """Materialize and convert below ``directory``."""
    bundle = make_bundle(model, make_plan(model, "gguf", layout, rule, **options), directory / "bundle")
    with new_directory(directory / "export") as out:
        converter.convert(bundle, out, lambda _: None)
    return bundle, directory / "export"
