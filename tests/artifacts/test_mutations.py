"""Every value of every artifact, replaced by what does not belong there: one sentence, of the right class, at once."""

from __future__ import annotations

import copy
import functools
import json
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from acip_export.artifacts.bundle import Manifest
from acip_export.artifacts.document import Artifact, read_artifact
from acip_export.artifacts.plan import load_plan
from acip_export.artifacts.report import load_report
from acip_export.artifacts.rounding_errors import load_rounding_errors
from acip_export.artifacts.scores import load_scores
from acip_export.check.config import load_config
from acip_export.check.lock import dumps_lock, load_lock
from acip_export.check.quality import Quality
from acip_export.check.snapshot import FileRecord, Snapshot
from acip_export.devices import load_devices
from acip_export.errors import (
    AcipError,
    BaselineError,
    BundleError,
    DeviceFileError,
    InputError,
    PlanFileError,
    ScoreFileError,
    UnsupportedError,
    UsageError,
)
from acip_export.inspection.diff import Stored
from acip_export.report.page import embedded
from tests.artifacts import examples
from tests.reports import REPORT

MANY_DIGITS = "9" * 5000
# As they stand in JSON; what TOML writes otherwise is in _TOML.
WRONG = {
    "list": "[]",
    "list of lists": "[[1]]",
    "object": "{}",
    "object of objects": '{"a": {"b": 1}}',
    "null": "null",
    "true": "true",
    "text": '"7"',
    "empty text": '""',
    "escape": '"\\u001b[2J\\u0000"',
    "half a pair": '"\\ud800"',
    "zero": "0",
    "minus one": "-1",
    "fraction": "0.5",
    "2^63": str(2**63),
    "2^64": str(2**64),
    "many digits": MANY_DIGITS,
    "NaN": "NaN",
    "Infinity": "Infinity",
    "1e400": "1e400",
    "-1e308": "-1e308",
    "deep": "[" * 20_000 + "]" * 20_000,
    "deep objects": '{"a":' * 20_000 + "1" + "}" * 20_000,
}
TOML = WRONG | {
    "object of objects": "{a = {b = 1}}",
    "null": '"\\uD800"',
    "half a pair": '"\\uDFFF"',
    "NaN": "nan",
    "Infinity": "inf",
    "deep": "[" * 2_000 + "]" * 2_000,
    "deep objects": "{a=" * 2_000 + "1" + "}" * 2_000,
}
_HERE = "@@@"

Write = Callable[[str], Path]
Load = Callable[[Path], object]


def places(document: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value in a parsed document, outermost first."""
    yield place
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from places(value, (*place, key))


def replaced(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


def mutations(
    document: Any, dumps: Callable[[Any], str] = json.dumps, wrong: dict[str, str] = WRONG
) -> Iterator[tuple[str, str]]:
    """What was done, and the text."""
    for place in places(document):
        text = dumps(replaced(document, place, _HERE))
        for what, token in wrong.items():
            yield f"{place}: {what}", text.replace(f'"{_HERE}"', token)
        value = functools.reduce(lambda inner, key: inner[key], place, document)
        if isinstance(value, dict):
            yield f"{place}: another key", dumps(replaced(document, place, {**value, "more": 1}))
            for gone in value:
                fewer = {key: inner for key, inner in value.items() if key != gone}
                yield f"{place}: no {gone}", dumps(replaced(document, place, fewer))


def _read(load: Load, file: Path, errors: tuple[type[AcipError], ...], what: str) -> bool:
    """Whether it was refused."""
    try:
        made = load(file)
    except AcipError as error:
        assert isinstance(error, errors), f"{what}: {error!r}"
        assert len(str(error)) < 2000, what
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    if isinstance(made, Artifact):
        json.dumps(made.to_json(), allow_nan=False)
    return False


def check_all(cases: Iterator[tuple[str, str]], write: Write, load: Load, errors: tuple[type[AcipError], ...]) -> None:
    refused = 0
    for what, text in cases:
        file = write(text)
        start = time.process_time()
        refused += _read(load, file, errors, what)
        if time.process_time() - start > 1:
            # Python's collection of garbage, after thousands of other tests, takes as long: what is slow is slow again.
            start = time.process_time()
            _read(load, file, errors, what)
            assert time.process_time() - start < 1, what
    assert refused > 30


def _lock() -> dict[str, Any]:
    quality = Quality(0.9, "perplexity", 1.0, 1000)
    tensors = {"a.weight": Stored("q8_0", (4, 4), 17), "b": Stored("f32", (4,), 16)}
    made = Snapshot("m.gguf", "gguf", "llama", {"m.gguf": FileRecord(1000, "0" * 64)}, tensors, quality)
    document: dict[str, Any] = json.loads(dumps_lock({"m": made}))
    return document


JSON = {
    "plan": (examples.PLAN.to_json(), load_plan, (PlanFileError, UnsupportedError)),
    "report": (REPORT.to_json(), load_report, (InputError,)),
    "bundle": (examples.MANIFEST.to_json(), lambda file: read_artifact(file, Manifest, BundleError), (BundleError,)),
    "lock": (_lock(), load_lock, (BaselineError,)),
}


@pytest.mark.parametrize("name", JSON)
def test_json(name: str, tmp_path: Path) -> None:
    document, load, errors = JSON[name]
    document = json.loads(json.dumps(document))
    file = tmp_path / "document.json"

    def write(text: str) -> Path:
        file.write_text(text, encoding="utf-8")
        return file

    load(write(json.dumps(document)))  # type: ignore[operator]
    check_all(mutations(document), write, load, errors)  # type: ignore[arg-type]
    twice = json.dumps(document)[:-1] + f', "version": {document["version"]}}}'
    with pytest.raises(errors, match="'version' twice"):
        load(write(twice))  # type: ignore[operator]


def test_a_cache_is_measured_again(tmp_path: Path) -> None:
    """Whatever is in it: a damaged cache is none."""
    document, file = json.loads(json.dumps(examples.ROUNDING_ERRORS.to_json())), tmp_path / "cache.json"
    for what, text in mutations(document):
        file.write_text(text, encoding="utf-8")
        found = load_rounding_errors(file, "gguf", "ggml 1", "2" * 64)
        assert found.dense.keys() <= {"a.weight", "a", "more"}, what
        json.dumps(found.to_json(), allow_nan=False)


def test_score_files(tmp_path: Path) -> None:
    """All documents of the header, and the header itself."""
    whole = examples.write_scores(tmp_path / "whole.acip").read_bytes()
    assert load_scores(tmp_path / "whole.acip").curve[1].loss_with_adapters == 3.5
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    file = tmp_path / "scores.acip"

    def write_header(text: str) -> Path:
        encoded = text.encode()
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
        return file

    def write_metadata(name: str) -> Write:
        return lambda text: write_header(json.dumps({**header, "__metadata__": {**header["__metadata__"], name: text}}))

    for name in ("model", "algorithm", "data", "versions", "curve", "modules"):
        cases = mutations(json.loads(header["__metadata__"][name]))
        check_all(cases, write_metadata(name), lambda file: load_scores(file), (ScoreFileError,))
    first = next(name for name in header if name != "__metadata__")
    small = {"__metadata__": header["__metadata__"], first: header[first]}
    rest = {name: entry for name, entry in header.items() if name not in small}

    def write_part(text: str) -> Path:
        return write_header(text[:-1] + ", " + json.dumps(rest)[1:] if text.startswith("{") and len(text) > 2 else text)

    check_all(mutations(small), write_part, lambda file: load_scores(file), (ScoreFileError,))


def toml_dumps(value: Any) -> str:
    """In one line, whose brackets the outermost table does without."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {inline(inner)}" for key, inner in value.items()) + "}"
        return "[" + ", ".join(map(inline, value)) + "]" if isinstance(value, list) else json.dumps(value)

    if not isinstance(value, dict):
        return f"check = {inline(value)}"
    return "\n".join(f"{json.dumps(key)} = {inline(inner)}" for key, inner in value.items())


@pytest.mark.parametrize(
    ("text", "load", "errors"),
    [(examples.DEVICES, load_devices, (DeviceFileError,)), (examples.CHECK, load_config, (UsageError,))],
    ids=["devices", "check"],
)
def test_toml(text: str, load: Load, errors: tuple[type[AcipError], ...], tmp_path: Path) -> None:
    file = tmp_path / "document.toml"

    def write(text: str) -> Path:
        file.write_text(text, encoding="utf-8")
        return file

    load(write(text))
    check_all(mutations(tomllib.loads(text), toml_dumps, TOML), write, load, errors)


def test_pyproject(tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    for place in ("tool", "tool.acip-export", "tool.acip-export.check"):
        for token in TOML.values():
            file.write_text(f"{place} = {token}\n", encoding="utf-8")
            with pytest.raises(UsageError):
                load_config(file)


def test_pages() -> None:
    """An earlier page that is damaged is no page."""
    for text in WRONG.values():
        assert embedded(f'<script type="application/json" id="data">{text}</script>') is None
