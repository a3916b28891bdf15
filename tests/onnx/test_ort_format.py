"""The ORT format is loaded back by onnxruntime and computes what the export does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from acip_export.errors import UnsupportedError, UsageError
from converters.onnx import ort_format
from converters.onnx.companion_files import DATA_FILE, MODEL_FILE
from converters.onnx.ort_format import OPERATORS_FILE, ORT_FILE, write_ort
from tests.onnx.conftest import MakeExport


def logits(model: Path, export: Any) -> Any:
    shape, count = export.bundle.as_checkpoint().shape, 9
    feeds: dict[str, Any] = {
        "input_ids": np.arange(count, dtype=np.int64)[None],
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
    }
    for layer in range(shape.layers):
        for kind in ("key", "value"):
            feeds[f"past_key_values.{layer}.{kind}"] = np.zeros((1, shape.kv_heads, 0, shape.head_dim), np.float32)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return session.run(["logits"], feeds)[0]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["mixed", "asymmetric", "factored f32"])
def test_the_ort_file_computes_what_the_export_does(make_export: MakeExport, tmp_path: Path, rule: str) -> None:
    export = make_export("llama", True, rule)
    files = write_ort(export.path, tmp_path / "ort")
    assert files == {file.name: file.stat().st_size for file in (tmp_path / "ort").iterdir()}
    assert {ORT_FILE, OPERATORS_FILE, "config.json", "tokenizer.json"} <= set(files)
    # The same kernels on the same numbers; the conversion fuses a few more nodes.
    difference = np.abs(logits(tmp_path / "ort" / ORT_FILE, export) - logits(export.path / MODEL_FILE, export)).max()
    assert difference <= 1e-5
    operators = (tmp_path / "ort" / OPERATORS_FILE).read_text(encoding="utf-8")
    assert re.search(r"^com\.microsoft;1;.*GroupQueryAttention", operators, re.MULTILINE)
    assert ("MatMulNBits" in operators) == (rule != "factored f32")
    assert str(tmp_path) not in operators
    with pytest.raises(UsageError, match="--force"):
        write_ort(export.path, tmp_path / "ort")
    # The conversion names what it fuses anew each time, so the flatbuffer's size is not quite the same.
    assert write_ort(export.path, tmp_path / "ort", force=True).keys() == files.keys()


def test_what_cannot_be_converted_is_refused(
    make_export: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = make_export("llama", True, "mixed")
    with pytest.raises(UnsupportedError, match="is no ONNX export"):
        write_ort(tmp_path, tmp_path / "ort")
    broken = tmp_path / "broken"
    (broken / "onnx").mkdir(parents=True)
    (broken / DATA_FILE).write_bytes(b"")
    (broken / MODEL_FILE).write_bytes((export.path / MODEL_FILE).read_bytes()[:-7])
    with pytest.raises(UnsupportedError, match="cannot convert"):
        write_ort(broken, tmp_path / "ort")
    monkeypatch.setattr(ort_format, "_LARGEST", 1000)
    with pytest.raises(UnsupportedError, match="holds at most 1,000"):
        write_ort(export.path, tmp_path / "ort")
    assert not list(tmp_path.glob("*ort*"))
