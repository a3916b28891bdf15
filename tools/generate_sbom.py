"""Make the bill of materials of a release: what `pip install 'acip-export[all]'` brings, and the files themselves.

CycloneDX 1.6 in JSON (https://cyclonedx.org/docs/1.6/json). Versions are the tested ones of `constraints.txt`, whatever
is installed (none where nothing is pinned: setuptools); dependencies and licences are as installed metadata say.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from packaging.requirements import Requirement

from acip_export.version import __version__
from tools.generate_licences import licence, pinned

NAME, EXTRA = "acip-export", "all"


def canonical(name: str) -> str:
    """Return the name that a registry knows a package by."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(name: str, extras: Sequence[str] = ()) -> Iterator[Requirement]:
    """Yield what an installed package needs here, with these extras."""
    for line in distribution(name).requires or ():
        wanted = Requirement(line)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield wanted


def dependencies() -> dict[str, list[str]]:
    """Return, by canonical name, what a package and all that it brings depend on."""
    found: dict[str, list[str]] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    waiting: list[tuple[str, tuple[str, ...]]] = [(NAME, (EXTRA,))]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            wanted = [(canonical(each.name), tuple(sorted(each.extras))) for each in required(name, extras)]
        except PackageNotFoundError:  # of another platform
            continue
        found[name] = sorted({*found.get(name, []), *(other for other, _ in wanted if other != name)})
        waiting += wanted
    return {name: [other for other in needs if other in found] for name, needs in sorted(found.items())}


def bill(files: Sequence[Path], moment: int) -> dict[str, Any]:
    """Return the bill.

    Args:
        files: of the release. moment: when it was made, seconds since 1970.
    """
    versions = {canonical(name): version for name, version in pinned().items()} | {NAME: __version__}
    graph = dependencies()
    refs = {name: f"pkg:pypi/{name}" + (f"@{versions[name]}" if name in versions else "") for name in graph}
    components = [
        {
            "type": "library",
            "bom-ref": refs[name],
            "name": name,
            **({"version": versions[name]} if name in versions else {}),
            "purl": refs[name],
            "licenses": [{"license": {"name": licence(distribution(name))}}],
        }
        for name in graph
        if name != NAME
    ]
    made = [
        {
            "type": "file",
            "bom-ref": file.name,
            "name": file.name,
            "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(file.read_bytes()).hexdigest()}],
        }
        for file in sorted(files)
    ]
    itself = {
        "type": "application",
        "bom-ref": refs[NAME],
        "name": NAME,
        "version": __version__,
        "purl": refs[NAME],
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "components": made,
    }
    content = json.dumps([itself, components], sort_keys=True)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, content)}",
        "version": 1,
        "metadata": {"timestamp": datetime.fromtimestamp(moment, UTC).isoformat(), "component": itself},
        "components": components,
        "dependencies": [
            {"ref": refs[name], "dependsOn": [refs[other] for other in needs]} for name, needs in graph.items()
        ],
    }


def write_bill(files: Sequence[Path], moment: int, out: Path) -> Path:
    """Write the bill of ``files`` into the directory ``out``."""
    file = out / f"{NAME.replace('-', '_')}-{__version__}.cdx.json"
    file.write_text(json.dumps(bill(files, moment), indent=1) + "\n", encoding="utf-8")
    return file
