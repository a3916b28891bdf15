"""docs/architecture.md describes the tree that is there, in the order that the linter enforces."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def packages() -> set[str]:
    """Every package of the product, two levels deep."""
    return {
        f"{top}/{folder.name}"
        for top in ("acip_export", "converters")
        for folder in (ROOT / top).iterdir()
        if (folder / "__init__.py").is_file()
    }


def test_every_package_has_a_row() -> None:
    named = set(re.findall(r"`((?:acip_export|converters)/\w+)`", PAGE.split("## Three walks")[0]))
    assert named == packages()


def test_the_rows_are_in_the_order_of_the_layers() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (c for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    place = {
        name.strip().replace(".", "/"): number
        for number, layer in enumerate(contract["layers"])
        for name in layer.split("|")
    }
    rows = re.findall(r"`((?:acip_export|converters)/\w+)`", PAGE.split("## Three walks")[0])
    order = [place.get(name, place.get(name.split("/")[0], 0)) for name in rows]
    assert order == sorted(order), dict(zip(rows, order, strict=True))


def test_files_that_the_page_names_exist() -> None:
    for name in re.findall(r"`([\w/]+\.py)`", PAGE):
        anywhere = [ROOT / name, ROOT / "acip_export" / name, *(ROOT / "acip_export").glob(f"*/{name}")]
        assert any(file.is_file() for file in anywhere), name
