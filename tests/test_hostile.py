"""Every kind of file that is read, damaged in every way that we know: a class, an exit code, a sentence, soon.

No traceback, no 30 seconds, no gibibyte beyond the file's size, and nothing is written. Each case goes through the
command line, in this process. Cases that only one reader can meet are beside its own tests.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from acip_export import errors
from acip_export.api import convert_bundle, materialize_bundle, plan_export
from acip_export.artifacts.plan import save_plan
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from tests.artifacts import examples
from tests.support import Run, make_model, make_scores

SECONDS, BYTES = 30, 2**30
MANY = 200_000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a whole file of every kind."""
    place = tmp_path_factory.mktemp("good")
    model = make_model(place / "model", hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=1)
    make_scores(model, place / "scores.acip")
    checkpoint, scores = Checkpoint.open(model), make_scores(model, place / "scores.acip")
    plan = plan_export(checkpoint, scores, PlanRequest("gguf", 10**9, types=("f16",), context=64))
    save_plan(plan, place / "plan.json")
    materialize_bundle(checkpoint, scores, plan, place / "bundle")
    convert_bundle(place / "bundle", place / "export")
    shutil.copyfile(place / "export/model.gguf", place / "m.gguf")
    shutil.copyfile(model / "model.safetensors", place / "m.safetensors")
    weight = onnx.helper.make_tensor("w", 1, (64, 64), bytes(64 * 64 * 4), raw=True)
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    onnx.save(onnx.helper.make_model(graph), place / "m.onnx")
    (place / "devices.toml").write_text(examples.DEVICES)
    (place / "acip-check.toml").write_text('[[check]]\npath = "m.gguf"\nmax_bytes = "900MB"\n')
    (place / "data.jsonl").write_text(json.dumps({"text": "some words to read, again and again"}) + "\n")
    (place / "data.csv").write_text("n,text\n1,some words to read\n")
    (place / "data.json").write_text(json.dumps([{"text": "some words to read"}]))
    return place


@dataclass(frozen=True)
class Kind:
    """A file in ``good``, the command that reads it, and what it raises of damage."""

    file: str
    command: tuple[str, ...]
    error: type[errors.AcipError]
    text: bool = False


RANK = ("rank", "model", "--data", "data.jsonl", "--algorithm", "magnitude", "-o", "x.acip")
EXPORT = ("--model", "model", "--format", "gguf", "--budget", "1GB", "--no-verify", "-o", "out")
KINDS = {
    "gguf": Kind("m.gguf", ("inspect", "m.gguf"), errors.ModelFileError),
    "onnx": Kind("m.onnx", ("inspect", "m.onnx"), errors.ModelFileError),
    "safetensors": Kind("m.safetensors", ("inspect", "m.safetensors"), errors.ModelFileError),
    "weights": Kind("model/model.safetensors", RANK, errors.CheckpointError),
    "config": Kind("model/config.json", RANK, errors.CheckpointError, text=True),
    "tokenizer": Kind("model/tokenizer.json", RANK, errors.CheckpointError, text=True),
    "tokenizer options": Kind("model/tokenizer_config.json", RANK, errors.CheckpointError, text=True),
    "scores": Kind("scores.acip", (*EXPORT, "--scores", "scores.acip"), errors.ScoreFileError),
    "plan": Kind("plan.json", ("materialize", "plan.json", "--model", "model", "--scores", "scores.acip", "-o", "out"),
                 errors.PlanFileError, text=True),
    "bundle": Kind("bundle/bundle.json", ("convert", "bundle", "-o", "out"), errors.BundleError, text=True),
    "bundle's weights": Kind("bundle/model.safetensors", ("convert", "bundle", "-o", "out"), errors.BundleError),
    "base": Kind("m.gguf", (*EXPORT, "--scores", "scores.acip", "--base-gguf", "m.gguf"), errors.AcipError),
    "importance": Kind("m.gguf", (*EXPORT, "--scores", "scores.acip", "--imatrix", "m.gguf"), errors.ImatrixError),
    "devices": Kind("devices.toml", ("devices", "camera"), errors.DeviceFileError, text=True),
    "check": Kind("acip-check.toml", ("check",), errors.UsageError, text=True),
    "data in lines": Kind("data.jsonl", RANK, errors.DataError, text=True),
    "data in a table": Kind("data.csv", (*RANK[:3], "data.csv", *RANK[4:]), errors.DataError, text=True),
    "data in an array": Kind("data.json", (*RANK[:3], "data.json", *RANK[4:]), errors.DataError, text=True),
}  # fmt: skip

Damage = Callable[[bytes], bytes]


def packed(data: bytes) -> bytes:
    """A zip bomb of a kind: 30 MB of zeros under the name of a module."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../archive/data.pkl", bytes(30_000_000))
        archive.writestr("data", data)
    return stream.getvalue()


class Attack:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('attacked').touch()",))


def flipped(data: bytes) -> bytes:
    chance = random.Random(0)
    return bytes(byte ^ chance.randrange(256) for byte in data[:4096]) + data[4096:]


# Of any file.
DAMAGES: dict[str, Damage] = {
    "empty": lambda _: b"",
    "a byte": lambda _: b"\x00",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "ones": lambda data: b"\xff" * len(data),
    "flipped": flipped,
    "gzip": gzip.compress,
    "zip": packed,
    "pickle": lambda _: pickle.dumps(Attack()),
    "page": lambda _: b"<!DOCTYPE html>\n<html><body>Sign in</body></html>",
    "pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7\n",
    "huge length": lambda data: (2**63 - 1).to_bytes(8, "little") + data[8:],
    "largest length": lambda data: b"\xff" * 8 + data[8:],
}
# Of one that is text. Tables and lines of text have no brackets to close.
TEXTS: dict[str, Damage] = {
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "Latin-1": lambda data: data.replace(b"a", "ü".encode("latin-1"), 3),
    "brackets": lambda _: b"[" * MANY,
    "objects": lambda _: b'{"a":' * MANY,
    "digits": lambda _: b'{"version": ' + b"9" * 5000 + b"}",
    "half a pair": lambda _: b'{"text": "\\ud800", "n": 1}x',
    "a list": lambda _: b"[[1]]",
    "null": lambda _: b"null",
}
CASES = [
    f"{kind}: {damage}"
    for kind, row in KINDS.items()
    for damage in (*DAMAGES, *(TEXTS if row.text else ()))
    # What is no damage: an empty file of options is none; a zip or a page is a table of one column.
    if (kind, damage) not in {("tokenizer options", "digits")}
]


def test_there_are_enough() -> None:
    assert len(CASES) + len(COUNTS) >= 150


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``good`` whose files are links until they are damaged."""

    def link(source: str, target: str) -> str:
        Path(target).hardlink_to(source)
        return target

    shutil.copytree(good, tmp_path / "place", copy_function=link)
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("ACIP_EXPORT_DEVICES", "devices.toml")
    return tmp_path / "place"


def refused(run: Run, command: tuple[str, ...], error: type[errors.AcipError], size: int) -> None:
    before = sorted(Path.cwd().rglob("*"))
    start, most = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = run(*command, "--json")
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) * 1024 < BYTES + size
    said = json.loads(done.out)
    assert "this is a bug" not in said["error"] and "Traceback" not in done.err, said
    assert issubclass(getattr(errors, said["kind"]), error), said
    assert done.code == said["code"] in (2, 3, 5), said
    assert len(said["error"]) < 3000
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_damage(case: str, place: Path, run: Run) -> None:
    name, _, damage = case.partition(": ")
    kind = KINDS[name]
    file = place / kind.file
    data = (DAMAGES | TEXTS)[damage](file.read_bytes())
    file.unlink()
    file.write_bytes(data)
    refused(run, kind.command, kind.error, len(data))


@pytest.mark.parametrize(
    "name", [name for name, kind in KINDS.items() if name != "importance" and kind.command[0] != "rank"]
)
@pytest.mark.usefixtures("place")
def test_whole_files_pass(name: str, run: Run) -> None:
    command = KINDS[name].command
    if name == "base":
        command = (*command, "--types", "f16")
    done = run(*command)
    assert done.code == 0, done.err


def gguf(tensors: int, keys: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def header(entries: str) -> bytes:
    return len(entries).to_bytes(8, "little") + entries.encode()


def varint(number: int) -> bytes:
    found = b""
    while number >= 0x80:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def entries(extents: str, count: int = 1) -> bytes:
    """Of a safetensors file, and a byte of data."""
    row = f'{{"dtype":"F32","shape":[{extents}],"data_offsets":[0,0]}}'
    return header("{" + ",".join(f'"t{number}":{row}' for number in range(count)) + "}") + b"x"


def graph(*tensors: bytes) -> bytes:
    return field(7, b"".join(field(5, tensor) for tensor in tensors)) + field(8, b"\x10\x15")


def key(value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"a" + value


TENSOR = key(struct.pack("<IQIQ", 1, 0, 0, 0))
STRINGS = key(struct.pack("<IIQ", 9, 8, 10**6 + 1)) + bytes(8 * 10**6)
LARGEST = b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
FLOAT = b"\x10\x01"
# Counts and sizes that are larger than they look: files of megabytes at most.
COUNTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "gguf: tensors": ("m.gguf", lambda: gguf(MANY, 0, TENSOR * MANY)),
    "gguf: keys": ("m.gguf", lambda: gguf(0, MANY, key(struct.pack("<IB", 0, 1)) * MANY)),
    "gguf: empty strings": ("m.gguf", lambda: gguf(0, 1, STRINGS)),
    "safetensors: tensors": ("m.safetensors", lambda: entries("0", MANY)),
    "safetensors: dimensions": ("m.safetensors", lambda: entries("1," * 300_000 + "0")),
    "safetensors: an extent": ("m.safetensors", lambda: entries("4294967296,4294967296,0")),
    "safetensors: a number": ("m.safetensors", lambda: entries("9" * 5000)),
    "safetensors: blanks": ("m.safetensors", lambda: header(" " * 50_000_000)),
    "onnx: packed dimensions": ("m.onnx", lambda: graph(field(1, b"\x01" * 2_000_000) + FLOAT)),
    "onnx: dimensions": ("m.onnx", lambda: graph(b"\x08\x01" * 2_000_000 + FLOAT)),
    "onnx: extents": ("m.onnx", lambda: graph(LARGEST * 8 + FLOAT + field(8, b"w"))),
    "onnx: no data": ("m.onnx", lambda: graph(b"\x08\x04" + FLOAT + field(8, b"w"))),
    "onnx: tensors": ("m.onnx", lambda: graph(*[field(1, b"\x00") + FLOAT] * MANY)),
    "onnx: a varint without end": ("m.onnx", lambda: b"\xff" * 1_000_000),
    "onnx: graphs that end too late": ("m.onnx", lambda: b"\x3a\xff\xff\xff\xff\x0f" * 100_000),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts_and_sizes_that_lie(case: str, place: Path, run: Run) -> None:
    name, make = COUNTS[case]
    data = make()
    (place / name).unlink()
    (place / name).write_bytes(data)
    refused(run, ("inspect", name), errors.ModelFileError, len(data))


def test_the_pickle_is_one_that_would_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Attack()))
    assert (tmp_path / "attacked").exists()


@pytest.mark.parametrize("target", ["../outside", "/dev/zero", "pipe"])
def test_external_data_behind_links(target: str, place: Path, run: Run) -> None:
    """``check --update`` wrote a lock of such a file."""
    weight = onnx.helper.make_tensor("w", 1, (4, 4), bytes(64), raw=True)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [weight]))
    (place / "web").mkdir()
    onnx.save(model, place / "web/m.onnx", save_as_external_data=True, location="data", size_threshold=0)
    (place / "web/data").rename(place / "outside")
    os.mkfifo(place / "web/pipe")
    (place / "web/data").symlink_to(target)
    (place / "acip-check.toml").write_text('[[check]]\npath = "web/m.onnx"\nmax_bytes = "900MB"\n')
    refused(run, ("inspect", "web/m.onnx"), errors.ModelFileError, 0)
    assert run("check", "--update").code == 6
    assert not (place / "acip-check.lock.json").exists()


def test_external_data_in_a_cache_of_links(place: Path, run: Run) -> None:
    """As downloads from the Hub lie."""
    weight = onnx.helper.make_tensor("w", 1, (4, 4), bytes(64), raw=True)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [weight]))
    (place / "blobs").mkdir()
    onnx.save(model, place / "blobs/abc", save_as_external_data=True, location="data", size_threshold=0)
    (place / "snapshot").mkdir()
    (place / "snapshot/m.onnx").symlink_to("../blobs/abc")
    (place / "snapshot/data").symlink_to("../blobs/data")
    done = run("inspect", "snapshot/m.onnx")
    assert done.code == 0, done.err
