"""Readers against each format's own library, and against files that nobody should trust."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from acip_export.artifacts.plan import save_plan
from acip_export.errors import InputError, ModelFileError
from acip_export.inspection import read_anatomy
from acip_export.inspection.gguf import GGML_TYPES
from acip_export.inspection.onnx import ONNX_TYPES
from acip_export.inspection.read import choice
from acip_export.weight_types import types_of
from converters.gguf.types import TYPE_IDS
from tests.check.models import SMALL, make_onnx, write_gguf, write_onnx, write_safetensors
from tests.support import dense, make_bundle, make_model, make_plan, make_scores


def test_ggml_types_are_ggufs_and_ours() -> None:
    known = {int(kind): (kind.name.lower(), *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert known == {number: row for number, row in GGML_TYPES.items() if number in known}
    # Newer than gguf-py 0.19; its sizes are compared with ggml's where that is loaded.
    assert {row[0] for number, row in GGML_TYPES.items() if number not in known} <= {"q2_0"}
    for form in types_of("gguf"):
        assert GGML_TYPES[TYPE_IDS[form.name]] == (form.name, form.block, form.block_bytes)


def test_onnx_types_are_onnxs() -> None:
    for name, number in TensorProto.DataType.items():
        if number in ONNX_TYPES and ONNX_TYPES[number][1]:
            bits = ONNX_TYPES[number][1]
            values = helper.make_tensor("t", number, [8], bytes(bits), raw=True)
            assert len(values.raw_data) * 8 == 8 * bits
            onnx.checker.check_tensor(values)
            title = ONNX_TYPES[number][0].replace("float32", "float").replace("float64", "double")
            assert title == name.lower()


def test_gguf_equals_gguf_py(tmp_path: Path) -> None:
    types = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ2_XXS", "TQ1_0", "Q1_0", "MXFP4", "I8"]
    tensors = {f"blk.{i}.x.weight": (i + 1, 512, name) for i, name in enumerate(types)}
    file = write_gguf(tmp_path / "m.gguf", tensors)
    found = read_anatomy(file)
    theirs = gguf.GGUFReader(file)
    assert [(t.name, t.shape, t.type, t.nbytes) for t in found.tensors] == [
        (t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name.lower(), int(t.n_bytes))
        for t in theirs.tensors
    ]
    assert found.total_bytes == file.stat().st_size
    assert found.overhead_bytes == file.stat().st_size - sum(int(t.n_bytes) for t in theirs.tensors)
    assert found.facts["general.architecture"] == "llama"
    assert found.facts["llama.block_count"] == "2"
    assert found.facts["vocabulary"] == "3"


@pytest.mark.parametrize("external", [False, True])
def test_onnx_equals_onnx(external: bool, tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "m.onnx", external)
    found = {t.name: t for t in read_anatomy(file).tensors}
    for tensor in onnx.load(file).graph.initializer:
        mine = found[tensor.name]
        assert mine.shape == tuple(tensor.dims)
        expected = -(-int(np.prod(tensor.dims)) * ONNX_TYPES[tensor.data_type][1] // 8)
        if tensor.raw_data:  # numbers listed one by one are stored wider than their type
            assert mine.nbytes == expected == len(tensor.raw_data)
    assert found["layers.0.weight"].file == ("m.onnx_data" if external else "m.onnx")
    assert found["layers.1.weight"].nbytes == 24
    assert found["c"].type == "int64"
    assert {"inside", "inside (2)", "sparse_values", "sparse_indices", "packed"} <= set(found)
    assert len(found) == 8
    total = file.stat().st_size + ((tmp_path / "m.onnx_data").stat().st_size if external else 0)
    assert read_anatomy(file).total_bytes == total
    assert read_anatomy(tmp_path).total_bytes == total
    assert read_anatomy(file).facts["opset ai.onnx"] == "21"


def test_tied_external_weights_count_once(tmp_path: Path) -> None:
    write_onnx(tmp_path / "m.onnx", external=True)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    twin = model.graph.initializer.add()
    twin.CopyFrom(model.graph.initializer[0])
    twin.name = "tied"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    found = {t.name: t for t in read_anatomy(tmp_path / "m.onnx").tensors}
    assert (found["layers.0.weight"].nbytes, found["tied"].nbytes) == (128, 0)


def test_external_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    """Bytes that are counted twice would hide others."""
    write_onnx(tmp_path / "m.onnx", external=True)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    twin = model.graph.initializer.add()
    twin.CopyFrom(model.graph.initializer[0])
    twin.name = "shifted"
    twin.dims[:] = [8]
    for entry in twin.external_data:
        entry.value = {"offset": "64", "length": "32"}.get(entry.key, entry.value)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match="overlap at byte 64"):
        read_anatomy(tmp_path / "m.onnx")


def test_unknown_ggml_type_takes_what_lies_before_the_next(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    data = file.read_bytes()
    old = b"blk.0.attn_q.weight" + struct.pack("<IQQI", 2, 256, 4, 12)
    assert old in data
    file.write_bytes(data.replace(old, old[:-4] + struct.pack("<I", 99)))
    tensor = {t.name: t for t in read_anatomy(file).tensors}["blk.0.attn_q.weight"]
    assert (tensor.type, tensor.nbytes) == ("type 99", 4 * 144)


def test_safetensors_scores_plan_bundle_and_directories(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    scores = make_scores(model)
    plan = make_plan(model, "onnx", "factored", dense(type="f32"))
    bundle = make_bundle(model, plan, tmp_path / "bundle", scores)
    save_plan(plan, tmp_path / "plan.json")
    counted = sum(f.stat().st_size for f in model.iterdir() if f.suffix != ".acip")
    # What planning leaves beside a model is none of it.
    save_plan(replace(plan, files={"model.onnx": 1}), model / "plan.json")
    (model / "tiny.acip.rounding-onnx.json").write_text("{}")

    kinds = {path: read_anatomy(path) for path in (model, bundle.path, tmp_path / "plan.json", model / "tiny.acip")}
    assert [a.kind for a in kinds.values()] == ["model", "bundle", "plan", "scores"]
    assert not {"tiny.acip", "tiny.acip.rounding-onnx.json", "plan.json"} & set(kinds[model].files)
    assert kinds[model].total_bytes == counted
    assert kinds[bundle.path].total_bytes == sum(f.stat().st_size for f in bundle.path.iterdir())
    planned = kinds[tmp_path / "plan.json"]
    assert [t.nbytes for t in planned.tensors] == [d.nbytes for d in plan.tensors]
    assert [t.type for t in planned.tensors] == [choice(d) for d in plan.tensors]


def test_a_plans_loss_has_its_unit(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    plan = make_plan(model, "gguf", "stock", dense(type="f32"))
    encoder = replace(plan, task="embedding")
    for each, unit in ((plan, "nats per token"), (encoder, "cosine distance per text")):
        save_plan(each, tmp_path / f"{unit}.json")
        assert f" {unit} above" in read_anatomy(tmp_path / f"{unit}.json").facts["predicted loss"]


def test_export_does_not_count_its_papers(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    export = tmp_path / "export"
    size = write_gguf(export / "model.gguf").stat().st_size
    save_plan(make_plan(model, "gguf", "stock", dense(type="f32")), export / "plan.json")
    for paper in ("report.json", "report.html", "README.md"):
        (export / paper).write_text("x" * 1000)
    found = read_anatomy(export)
    assert (found.kind, found.total_bytes) == ("export", size)
    (export / "tokenizer.json").write_text("12345")
    assert read_anatomy(export).total_bytes == size + 5


def test_a_plan_beside_a_model_makes_no_export(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    plan = make_plan(model, "gguf", "stock", dense(type="f32"))
    save_plan(replace(plan, files={"config.json": 1, "model.gguf": 1000}, planned_bytes=1001), model / "plan.json")
    assert read_anatomy(model).kind == "model"
    write_gguf(model / "model.gguf")
    assert read_anatomy(model).kind == "export"


def test_directory_with_two_models_tells_them_apart(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "sub" / "b.gguf", {"only.weight": (1, 256, "F32"), "output.weight": (1, 256, "F32")})
    names = {t.name for t in read_anatomy(tmp_path).tensors}
    assert {"a.gguf: output.weight", "sub/b.gguf: output.weight", "only.weight"} <= names


@pytest.mark.parametrize("write", [write_gguf, write_onnx, write_safetensors])
def test_every_truncation_is_noticed(write: Callable[[Path], Path], tmp_path: Path) -> None:
    file = write(tmp_path / f"m.{write.__name__.removeprefix('write_')}")
    whole = file.read_bytes()
    read_anatomy(file)
    # GGUF pads the last tensor; that padding may be missing.
    needed = len(whole) - 31 if file.suffix == ".gguf" else len(whole)
    for length in range(0, needed, 1 if needed < 2000 else 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            read_anatomy(file)


@pytest.mark.parametrize("write", [write_gguf, write_onnx, write_safetensors])
def test_damage_is_an_input_error_or_harmless(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """Any bytes changed anywhere: no other exception, no more than a moment, never more bytes than the file has."""
    file = write(tmp_path / f"m.{write.__name__.removeprefix('write_')}")
    whole = file.read_bytes()

    @settings(max_examples=150, deadline=2000, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=4))
    def harm(changes: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for position, value in changes:
            data[position] = value
        file.write_bytes(bytes(data))
        try:
            found = read_anatomy(file)
        except InputError:
            return
        assert 0 <= found.tensor_bytes <= found.total_bytes == len(whole)

    harm()


def _gguf(version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _one_tensor(name: bytes, extents: tuple[int, ...], type_id: int, offset: int, data: int) -> bytes:
    info = _text(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, type_id, offset)
    head = _gguf(tensors=1, rest=info)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(data)


def _st(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def _onnx(change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = make_onnx()
    change(model)
    return bytes(model.SerializeToString())


def _outside(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location

    return change


def _nested(depth: int) -> bytes:
    """Graphs in attributes in graphs, by hand: the library would refuse to write them."""

    def field(number: int, data: bytes) -> bytes:
        length = len(data)
        size = b""
        while length >= 0x80:
            size += bytes([length & 0x7F | 0x80])
            length >>= 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + data

    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph) + field(8, b"\x10\x15")


ARRAYS_IN_ARRAYS = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4000000\n"

BAD: dict[str, tuple[str, bytes, str]] = {
    "empty gguf": ("m.gguf", b"", "is empty"),
    "empty onnx": ("m.onnx", b"", "is empty"),
    "other magic": ("m.gguf", b"GGML" + bytes(60), "no GGUF file"),
    "version 1": ("m.gguf", _gguf(version=1), "version 1"),
    "version 4": ("m.gguf", _gguf(version=4), "version 4"),
    "big-endian": ("m.gguf", _gguf(version=3 << 24), "big-endian"),
    "too many tensors": ("m.gguf", _gguf(tensors=2**60), "declares"),
    "too many keys": ("m.gguf", _gguf(keys=2**63), "declares"),
    "long key": ("m.gguf", _gguf(keys=1, rest=struct.pack("<Q", 2**63) + bytes(99)), "truncated"),
    "unknown value": ("m.gguf", _gguf(keys=1, rest=_text(b"k") + struct.pack("<I", 77) + bytes(9)), "type 77"),
    "long array": (
        "m.gguf",
        _gguf(keys=1, rest=_text(b"k") + struct.pack("<IIQ", 9, 4, 2**62) + bytes(9)),
        "truncated",
    ),
    "many strings": (
        "m.gguf",
        _gguf(keys=1, rest=_text(b"k") + struct.pack("<IIQ", 9, 8, 2**40) + bytes(9)),
        "declares",
    ),
    "long string": ("m.gguf", _gguf(keys=1, rest=_text(b"k") + struct.pack("<IIQQ", 9, 8, 1, 2**64 - 1)), "truncated"),
    "arrays in arrays": ("m.gguf", _gguf(keys=1, rest=_text(b"k") + ARRAYS_IN_ARRAYS), "array type"),
    "alignment": ("m.gguf", _gguf(keys=1, rest=_text(b"general.alignment") + struct.pack("<II", 4, 0)), "alignment"),
    "alignment of 3": (
        "m.gguf",
        _gguf(keys=1, rest=_text(b"general.alignment") + struct.pack("<II", 4, 3)),
        "alignment",
    ),
    "name not text": ("m.gguf", _one_tensor(b"\xff\xfe", (32,), 0, 0, 128), "not UTF-8"),
    "name steers terminals": ("m.gguf", _one_tensor(b"\x1b[2Jx", (32,), 0, 0, 128), "cannot be printed"),
    "name of two lines": ("m.gguf", _one_tensor(b"a\nb", (32,), 0, 0, 128), "cannot be printed"),
    "five dimensions": ("m.gguf", _one_tensor(b"a", (1, 1, 1, 1, 1), 0, 0, 32), "5 dimensions"),
    "odd row": ("m.gguf", _one_tensor(b"a", (100,), 12, 0, 144), "multiple of 256"),
    "data past the end": ("m.gguf", _one_tensor(b"a", (2**40,), 0, 0, 128), "truncated"),
    "extents overflow": ("m.gguf", _one_tensor(b"a", (2**63, 2**63), 0, 0, 128), "truncated"),
    "offset past the end": ("m.gguf", _one_tensor(b"a", (32,), 0, 2**62, 128), "truncated"),
    "offset unaligned": ("m.gguf", _one_tensor(b"a", (8,), 0, 3, 128), "truncated or damaged"),
    "gguf pointer": ("m.gguf", POINTER, "git lfs pull"),
    "onnx pointer": ("m.onnx", POINTER, "git lfs pull"),
    "safetensors pointer": ("m.safetensors", POINTER, "git lfs pull"),
    "text as onnx": ("m.onnx", b"hello, this is no model at all", "no ONNX file"),
    "field past the end": ("m.onnx", b"\x08\x0a\x3a\xff\x01\x0a\x00", "255 bytes expected at 5, 2 are there"),
    "no graph": ("m.onnx", _onnx(lambda m: m.ClearField("graph")), "no graph"),
    "no operator set": ("m.onnx", _onnx(lambda m: m.ClearField("opset_import")), "no operator set"),
    "raw data too short": (
        "m.onnx",
        _onnx(lambda m: setattr(m.graph.initializer[0], "raw_data", b"1234")),
        "its shape needs 128",
    ),
    "negative extent": ("m.onnx", _onnx(lambda m: m.graph.initializer[1].dims.append(-1)), "negative extent"),
    "absolute data": ("m.onnx", _onnx(_outside("/etc/passwd")), "not beside the model"),
    "data above": ("m.onnx", _onnx(_outside("../other.bin")), "not beside the model"),
    "data nowhere": ("m.onnx", _onnx(_outside("weights.bin")), "not beside it"),
    "deep graphs": ("m.onnx", _nested(40), "nested deeper"),
    "deep header": ("m.safetensors", _st(b"[" * 200_000), "expected object, got array"),
    "surrogate name": (
        "m.safetensors",
        _st(b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "half a surrogate pair",
    ),
    "other file": ("m.bin", b"\x80\x02}q\x00.", "is no GGUF"),
    "no plan": ("m.json", b"{}", "not a plan"),
    "deep plan": ("m.json", b"[" * 200_000, "expected object, got array"),
}


# Seconds of processor time. No figure of speed: what goes wrong here takes minutes, or all memory.
GUARD = 20


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    name, data, says = BAD[case]
    file = tmp_path / name
    file.write_bytes(data)
    begin = time.process_time()
    with pytest.raises(InputError, match=says):
        read_anatomy(file)
    # A count that is believed before it is checked would take minutes, or all memory.
    assert time.process_time() - begin < GUARD


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    offset = [t.data_offset for t in gguf.GGUFReader(file).tensors]
    old, new = (struct.pack("<IQ", 12, o - offset[0]) for o in (offset[2], offset[1]))
    data = file.read_bytes()
    assert data.count(old) == 1
    file.write_bytes(data.replace(old, new))
    with pytest.raises(ModelFileError, match="overlaps"):
        read_anatomy(file)


def test_external_data_too_short_or_missing(tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "m.onnx", external=True)
    data = tmp_path / "m.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match=r"m\.onnx_data is truncated"):
        read_anatomy(file)
    data.unlink()
    with pytest.raises(ModelFileError, match="copy that file as well"):
        read_anatomy(tmp_path)


def test_missing_and_empty_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        read_anatomy(tmp_path / "nowhere")
    with pytest.raises(ModelFileError, match="holds no model"):
        read_anatomy(tmp_path)


def test_a_large_vocabulary_is_read_in_one_pass(tmp_path: Path) -> None:
    """150,000 tokens and 300,000 merges, as Qwen has: most of a head's bytes."""
    file = tmp_path / "m.gguf"
    strings = b"".join(_text(b"token%d" % n) for n in range(1000)) * 450
    rest = _text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 450_000) + strings
    file.write_bytes(_gguf(keys=1, rest=rest))
    begin = time.process_time()
    assert read_anatomy(file).facts["vocabulary"] == "450000"
    assert time.process_time() - begin < GUARD


def test_only_headers_are_read(tmp_path: Path) -> None:
    """A sparse file of 64 GiB, which no test could read or hold in memory."""
    file = tmp_path / "m.gguf"
    file.write_bytes(_one_tensor(b"a", (2**34,), 0, 0, 0))
    os.truncate(file, file.stat().st_size + 2**36)
    begin = time.process_time()
    assert read_anatomy(file).tensor_bytes == 2**36
    assert time.process_time() - begin < GUARD


def test_totals_add_up(tmp_path: Path) -> None:
    found = read_anatomy(write_gguf(tmp_path / "m.gguf"))
    assert sum(s.nbytes for s in found.by_group()) == sum(s.nbytes for s in found.by_type()) == found.tensor_bytes
    assert {s.name: s.tensors for s in found.by_group()}["blk.*.attn_q.weight"] == 2
    assert found.largest(1)[0].name == "token_embd.weight"
    assert len(SMALL) == len(found.tensors)
