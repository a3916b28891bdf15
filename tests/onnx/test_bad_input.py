"""What cannot be exported is refused in words, before a file is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from acip_export import api as pipeline
from acip_export.api.plan import _loadable
from acip_export.cli.plan_options import PlanFlags
from acip_export.errors import OutputError, UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from converters.onnx import converter, ort_format
from converters.onnx.companion_files import DATA_FILE, MODEL_FILE
from converters.onnx.genai_builder import release
from tests.support import Run, dense, make_model, make_plan, make_scores

DEVICE = """
[[device]]
name = "tab"
title = "A tab that loads small files"
class = "browser"
memory = "1GiB"
usable = 0.9
runtimes = { onnx = "onnxruntime" }
types.onnx = ["f32"]
largest_file = "100kB"
source = { memory = "none", usable = "none", types = "none" }
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_model(
        tmp_path_factory.mktemp("models") / "tiny", hidden_size=64, intermediate_size=96, num_hidden_layers=1
    )
    make_scores(made)
    return made


CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "no such width": (("--budget", "50MB", "--types", "int3"), "onnx has no type 'int3'"),
    "a type of GGUF": (("--budget", "50MB", "--types", "int8,q4_k"), "no type of onnx, but of gguf: --format gguf"),
    "a type of ONNX": (
        ("--budget", "50MB", "--types", "int4-b64", "--format", "gguf"),
        "'int4-b64' is no type of gguf, but of onnx: --format onnx gguf has: f32",
    ),
    "a type of another backend": (
        ("--budget", "50MB", "--types", "f32", "--backend", "webgpu"),
        "onnx has no type 'f32' here",
    ),
    "a block without a kernel": (("--budget", "50MB", "--types", "int2-b16"), "int2-b16 is not exported: onnxruntime"),
    "a file too large for the device": (("--device", "tab"), "tab loads files of at most 100 kB"),
    "too large for the ORT format": (("--budget", "50MB", "--types", "f32", "--ort"), "holds at most 1,000"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_command_line_writes_nothing(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    flags, message = CASES[case]
    (tmp_path / "mine.toml").write_text(DEVICE)
    monkeypatch.setenv("ACIP_EXPORT_DEVICES", str(tmp_path / "mine.toml"))
    if "--ort" in flags:
        monkeypatch.setattr(ort_format, "_LARGEST", 1000)
    format = () if "--format" in flags else ("--format", "onnx")
    done = run("--model", model, *format, "--no-verify", "-o", tmp_path / "out", *flags)
    assert done.code == UnsupportedError.exit_code
    assert message in " ".join(done.err.split())
    assert [file.name for file in tmp_path.iterdir()] == ["mine.toml"]


def test_another_release_of_the_builder_stops_the_plan(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "version", lambda _: "0.19.0")
    checkpoint = Checkpoint.open(model)
    plan = make_plan(model, "onnx", "factored", dense(type="f32"))
    with pytest.raises(UnsupportedError, match=r"onnxruntime-genai 0\.19\.0 is installed"):
        converter.predict_files(checkpoint, "factored", plan.tensors, plan.serving)


def test_limits_of_files_at_their_real_sizes(model: Path) -> None:
    request = PlanFlags(model=str(model), device="browser").request()
    assert request.largest_file is not None
    plan = make_plan(model, "onnx", "factored", dense(type="f32"))
    fits = replace(plan, files={MODEL_FILE: 300_000, DATA_FILE: request.largest_file})
    assert _loadable(fits, request) is fits
    with pytest.raises(UnsupportedError, match=r"(?s)onnx/model.onnx_data would have 2\.\d+ GB.*--budget-scope file"):
        _loadable(replace(plan, files={**fits.files, DATA_FILE: request.largest_file + 10**7}), request)
    ort_format.check_size({MODEL_FILE: 0, DATA_FILE: 2**31 - 1})
    with pytest.raises(UnsupportedError, match="2,147,483,648 bytes; the ORT format holds at most 2,147,483,647"):
        ort_format.check_size({MODEL_FILE: 1, DATA_FILE: 2**31 - 1})


def test_what_fails_while_writing_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters.onnx import writer

    written = []

    def stops(file: Path, *_: object) -> None:
        file.write_bytes(b"half")
        written.append(file)
        raise OSError(28, "No space left on device")

    checkpoint, scores = Checkpoint.open(model), pipeline.open_scores(Checkpoint.open(model), None)
    request = PlanFlags(model=str(model), budget=["50MB"], format_="onnx", types="f32").request()
    plan = pipeline.plan_export(checkpoint, scores, request)
    monkeypatch.setattr(writer, "write_data", stops)
    with pytest.raises(OutputError, match="No space left"):
        pipeline.export_model(checkpoint, scores, plan, tmp_path / "out", verify=False)
    assert written and not list(tmp_path.iterdir())
