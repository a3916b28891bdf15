"""The adapter refuses a model builder that is not the one it was written against."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest

from acip_export.errors import UnsupportedError
from converters.onnx import converter
from converters.onnx.genai_builder import builder, release
from tests.onnx.conftest import MakeExport


class Stock:
    """Every internal that the adapter relies on, as the tested release has it."""


for method, parameters in builder._INTERNALS.items():
    exec(f"def {method}(self, {', '.join(parameters)}): ...", scope := {})
    setattr(Stock, method, scope[method])


def test_the_tested_release_is_accepted() -> None:
    builder.check_internals(Stock)
    release.check_release()


@pytest.mark.parametrize("name", builder._INTERNALS)
def test_a_missing_internal_fails_loudly(name: str) -> None:
    lacking = type("Lacking", (), {k: v for k, v in vars(Stock).items() if k != name and not k.startswith("__w")})
    with pytest.raises(UnsupportedError, match=re.escape(name)):
        builder.check_internals(lacking)


def test_renamed_parameters_fail_loudly() -> None:
    class Renamed(Stock):
        def make_matmul(self, matmul: object, basename: str, root: str, **kwargs: object) -> None: ...

    with pytest.raises(UnsupportedError, match=r"make_matmul.*found.*'root'"):
        builder.check_internals(Renamed)


@pytest.mark.parametrize("found", ["0.17.2", "0.19.0", "1.0"])
def test_another_release_fails_loudly(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(release, "version", lambda _: found)
    with pytest.raises(UnsupportedError, match=re.escape("pip install 'onnxruntime-genai==0.18.*'")):
        release.check_release()


def test_prints_become_log_lines(
    make_export: MakeExport, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    export = make_export("llama", True, "int4")
    capsys.readouterr()
    with caplog.at_level(logging.DEBUG, "converters.onnx.genai_builder.builder"):
        converter.convert(export.bundle, tmp_path, lambda _: None)
    assert capsys.readouterr().out == ""
    assert "Reading LM head" in caplog.text


def test_the_import_path_is_left_as_found(make_export: MakeExport) -> None:
    make_export("llama", True, "int4")
    assert not [entry for entry in sys.path if entry.endswith("onnxruntime_genai/models")]
