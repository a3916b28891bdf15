"""The bytes of our writer are gguf-py's, for any metadata and shapes; short or misplaced data is noticed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acip_export.weight_types import types_of
from converters.gguf import writer
from converters.gguf.types import TYPE_IDS
from converters.gguf.writer import GgufWriter, TensorSpec

KNOWN = [form for form in types_of("gguf") if form.name.upper() in gguf.GGMLQuantizationType.__members__]
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
UINT32 = st.integers(0, 2**32 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)
# kind -> (our encoder, gguf-py's method, values)
KINDS = {
    "uint32": (writer.uint32, "add_uint32", UINT32),
    "float32": (writer.float32, "add_float32", st.floats(width=32, allow_nan=False)),
    "boolean": (writer.boolean, "add_bool", st.booleans()),
    "string": (writer.string, "add_string", NAMES),
    "strings": (writer.strings, "add_array", st.lists(NAMES, min_size=1, max_size=5)),
    "int32s": (writer.int32s, "add_array", st.lists(INT32, min_size=1, max_size=5)),
}


@st.composite
def specs(draw: st.DrawFn, names: st.SearchStrategy[str] = NAMES) -> list[TensorSpec]:
    found = []
    for name in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        form = draw(st.sampled_from(KNOWN))
        columns = form.block * draw(st.integers(1, 3))
        shape = draw(st.sampled_from([(columns,), (1, columns), (7, columns)]))
        found.append(TensorSpec(name, shape, form.name))
    return found


@settings(max_examples=40, deadline=None)
@given(
    tensors=specs(), kinds=st.lists(st.sampled_from(sorted(KINDS)), max_size=8), data=st.data(), seed=st.integers(0, 99)
)
def test_same_bytes_as_gguf_py(
    tensors: list[TensorSpec],
    kinds: list[str],
    data: st.DataObject,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    generator = np.random.default_rng(seed)
    contents = [generator.integers(0, 256, tensor.nbytes, np.uint8) for tensor in tensors]
    metadata = {"general.architecture": writer.string("llama")}
    theirs = gguf.GGUFWriter(folder / "theirs.gguf", "llama")
    for index, kind in enumerate(kinds):
        encode, method, values = KINDS[kind]
        value = data.draw(values)
        metadata[f"key.{index}"] = encode(value)
        getattr(theirs, method)(f"key.{index}", value)
    for tensor, content in zip(tensors, contents, strict=True):
        number = gguf.GGMLQuantizationType(TYPE_IDS[tensor.type])
        theirs.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), content.nbytes, raw_dtype=number)
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_ti_data_to_file()
    for content in contents:
        theirs.write_tensor_data(content)
    theirs.close()
    with GgufWriter(folder / "ours.gguf", metadata, tensors) as ours:
        for tensor, content in zip(tensors, contents, strict=True):
            ours.write(tensor.name, content)
    written = (folder / "ours.gguf").read_bytes()
    assert written == (folder / "theirs.gguf").read_bytes()
    assert len(written) == writer.file_bytes(metadata, tensors)


SPECS = [TensorSpec("a", (2, 32), "q8_0"), TensorSpec("b", (4,), "f32")]


def test_data_out_of_order_or_short_is_refused(tmp_path: Path) -> None:
    for name, size in (("b", 16), ("a", 67)):
        with pytest.raises(ValueError, match="expected"), GgufWriter(tmp_path / "x.gguf", {}, SPECS) as ours:
            ours.write(name, np.zeros(size, np.uint8))


def test_missing_tensors_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing \['b'\]"), GgufWriter(tmp_path / "x.gguf", {}, SPECS) as ours:
        ours.write("a", np.zeros(68, np.uint8))
