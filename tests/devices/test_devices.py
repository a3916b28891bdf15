"""Devices: the package's table, users' files, and what --device does to a request."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest

from acip_export.cli.plan_options import PlanFlags
from acip_export.devices import DEVICES_VARIABLE, find_device, load_devices, speeds_of, user_file
from acip_export.errors import AcipError, DeviceFileError, UnsupportedError, UsageError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import resolve
from tests.support import make_model

ENTRY = """
[[device]]
name = "camera"
title = "Door camera"
class = "board"
memory = "1GiB"
usable = 0.4
runtimes = { gguf = "llama.cpp" }
types.gguf = ["q8_0", "q4_0"]
context = 512
source = { memory = "data sheet", usable = "measured", types = "benchmark" }
"""

REPORTED = """
[[model]]
name = "toy"
weights = 100
layers = 2
source = "config.json"

[[chip]]
name = "soc"
title = "A chip"
reports = [{runtime = "llama.cpp", model = "toy", type = "q4_0", size = "1MB", prompt = 9.5, answer = 2, source = "x"}]
"""


@pytest.fixture(autouse=True)
def no_users_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "config"))
    monkeypatch.delenv(DEVICES_VARIABLE, raising=False)


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(ENTRY)
    return file


def test_the_packages_table() -> None:
    devices = load_devices()
    assert len(devices) >= 14
    assert len({device.kind for device in devices.values()}) >= 5
    for device in devices.values():
        assert 0 < device.budget_bytes < device.memory_bytes
        assert set(device.types) == set(device.runtimes)  # validated against the targets on loading
        assert all("http" in text or "estimate" in text or "ggml" in text for text in device.sources.values()), device
        # Without a published figure the share must admit that it is an estimate.
        assert "http" in device.sources["usable"] or device.sources["usable"].startswith(("estimate", "measured"))


@pytest.mark.parametrize("name", ["cpu-16gb", "cuda-8gb", "iphone-17-pro-12gb", "pixel-10-12gb", "dgx-spark-128gb"])
def test_devices_of_today_and_of_any_make_are_known(name: str) -> None:
    assert find_device(name, load_devices()).default_format == "gguf"


def test_types_for_rows_that_256_does_not_divide_are_not_called_slow() -> None:
    # Kernels of their own on x86, Arm, CUDA and Metal; WebAssembly has none of q4_1.
    for device in load_devices().values():
        narrow = {"q5_1", "q5_0", "q4_1"} - set(device.types["gguf"])
        assert narrow == ({"q4_1"} if device.kind == "browser" else set()), device.name


def test_phones_enforce_what_cannot_be_dropped() -> None:
    for device in load_devices().values():
        assert (device.enforces == "anonymous") == (device.kind == "phone")
        assert ("enforces" in device.sources) == (device.enforces is not None)


def test_later_files_win(camera: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "camera" not in load_devices()
    user_file().parent.mkdir(parents=True)
    user_file().write_text(ENTRY)
    assert load_devices()["camera"].budget_bytes == 2**30 * 4 // 10
    named = tmp_path / "named.toml"
    named.write_text(ENTRY.replace("1GiB", "2GiB"))
    monkeypatch.setenv(DEVICES_VARIABLE, str(named))
    assert load_devices()["camera"].memory_bytes == 2**31
    assert load_devices(camera)["camera"].memory_bytes == 2**30
    assert load_devices(camera)["camera"].defined_in == str(camera)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[[device]]", "[device]", "$.device: expected array, got object"),
        ("[[device]]", "[[gadget]]", "gadget"),
        ('name = "camera"', "name = 3", "$.device[0].name: expected str, got int"),
        ('name = "camera"', "", "missing required field name"),
        (
            'name = "camera"',
            'name = "camera"\nenforces = "anonymous"',
            "enforces and source.enforces are given together",
        ),
        ('name = "camera"', 'name = "camera"\nenforces = "swap"', "$.device[0].enforces: invalid enum value 'swap'"),
        ('"1GiB"', '"1"', "has no unit"),
        ('"1GiB"', "1073741824", "$.device[0].memory: expected str, got int"),
        ("usable = 0.4", "usable = 1.4", "$.device[0].usable: expected float <= 1.0"),
        ("usable = 0.4", "usable = true", "$.device[0].usable: expected float, got bool"),
        ("usable = 0.4", "usable = 0", "$.device[0].usable: expected float > 0.0"),
        ("usable = 0.4", "usable = nan", "$.device[0].usable: expected float"),
        ('gguf = "llama.cpp"', 'coreml = "x"', "unknown format 'coreml'"),
        ('{ gguf = "llama.cpp" }', "{}", "$.device[0].runtimes: expected object of length >= 1"),
        ('"llama.cpp"', '"llama.c"', "unknown runtime 'llama.c'"),
        ('["q8_0", "q4_0"]', '["q8_0", "q4_5"]', "no type 'q4_5'"),
        ('["q8_0", "q4_0"]', "[]", "expected array of length >= 1"),
        ("types.gguf", "types.onnx", "formats of runtimes"),
        ("context = 512", "context = 0", "$.device[0].context: expected int >= 1"),
        ("context = 512", "largest_file = 2", "$.device[0].largest_file: expected str | null, got int"),
        ("context = 512", 'largest_file = "2"', "largest_file"),
        ("context = 512", 'whole_prompts = ["onnx"]', "formats of runtimes (gguf)"),
        ("context = 512", "colour = 1", "unknown field colour"),
        (', types = "benchmark"', "", "$.device[0].source: object missing required field types"),
        ('"benchmark"', '""', "$.device[0].source.types: expected str of length >= 1"),
        ("context = 512", "context = ", "is no TOML"),
        ("context = 512", 'chip = "sock"', "$.device[0].chip: no [[chip]] has the name 'sock'"),
        ('model = "toy"', 'model = "tiny"', "$.chip[0].reports[0].model: no [[model]] has the name 'tiny'"),
        ('runtime = "llama.cpp"', 'runtime = "vllm"', "$.chip[0].reports[0].runtime: unknown runtime 'vllm'"),
        ('type = "q4_0"', 'type = "int4"', "$.chip[0].reports[0].type: gguf has no type 'int4'"),
        ('size = "1MB"', 'size = "1"', "$.chip[0].reports[0].size '1' has no unit"),
        (", answer = 2", "", "$.chip[0].reports: none of llama.cpp has the speed of an answer"),
        ("prompt = 9.5", "prompt = 0", "$.chip[0].reports[0].prompt: expected float >= 0.001"),
        ("prompt = 9.5", "prompt = inf", "$.chip[0].reports[0].prompt: expected float <= 10000000.0"),
        ("answer = 2", "answer = 1e-300", "$.chip[0].reports[0].answer: expected float >= 0.001"),
        (', source = "x"', "", "missing required field source"),
        ("weights = 100", "weights = 0", "$.model[0].weights: expected int >= 1"),
        ("layers = 2", "layers = 2.5", "$.model[0].layers: expected int, got float"),
        ("[[model]]", ENTRY.strip() + "\n[[model]]", "the device 'camera' twice"),
        ("[[chip]]", '[[chip]]\nname = "soc"\ntitle = "t"\nreports = []\n[[chip]]', "expected array of length >= 1"),
    ],
)
def test_malformed_files(camera: Path, old: str, new: str, says: str) -> None:
    assert old in ENTRY + REPORTED
    camera.write_text((ENTRY + REPORTED).replace(old, new))
    with pytest.raises(DeviceFileError) as caught:
        load_devices(camera)
    assert says in str(caught.value)
    assert str(camera) in str(caught.value)


def test_a_file_may_hold_chips_alone_but_not_nothing(camera: Path) -> None:
    """Then the package's devices with that chip have what it says."""
    camera.write_text(REPORTED.replace("soc", "bcm2712"))
    chip = load_devices(camera)["raspberry-pi-5-8gb"].chip
    assert chip is not None and chip.title == "A chip"
    camera.write_text("# nothing")
    with pytest.raises(DeviceFileError, match="is empty"):
        load_devices(camera)


def test_the_largest_numbers_that_a_report_may_have_are_predicted_with(camera: Path) -> None:
    for answer, size, weights in ((1e7, "1B", 2**63 - 1), (1e-3, "9000000TB", 1), (1e7, "9000000TB", 2**63 - 1)):
        told = REPORTED.replace("answer = 2", f"answer = {answer}").replace("1MB", size)
        told = told.replace("weights = 100", f"weights = {weights}").replace("layers = 2", f"layers = {weights}")
        camera.write_text(ENTRY.replace("context = 512", 'chip = "soc"') + told)
        (speeds,) = load_devices(camera)["camera"].reported_speeds().values()
        for (matrix,) in speeds.matrices.values():
            assert 0 < matrix.read < inf and 0 < matrix.compute < inf


def test_files_of_users_have_chips_of_their_own_and_name_those_of_others(camera: Path) -> None:
    told = camera.with_name("told.toml")
    told.write_text(ENTRY.replace("camera", "second").replace("context = 512", 'chip = "soc"') + REPORTED)
    camera.write_text(ENTRY.replace("context = 512", 'chip = "bcm2712"'))
    second, board = load_devices(told)["second"], load_devices(camera)["camera"]
    assert second.chip is not None and second.to_json()["chip"]["reports"][0]["answer"] == 2
    (toy,) = speeds_of(second, needed=True).values()
    assert toy.answer_error == toy.prompt_error == 0.5
    assert set(toy.matrices) == {"q8_0", "q4_0", "q1_0"}  # what plans for it choose from, and have below adapters
    assert board.chip == load_devices()["raspberry-pi-5-8gb"].chip
    # A name that a later file has too means the later chip.
    told.write_text(ENTRY.replace("context = 512", 'chip = "bcm2712"') + REPORTED.replace("soc", "bcm2712"))
    assert load_devices(told)["camera"].chip == replace(second.chip, name="bcm2712")


def test_missing_and_binary_files(camera: Path) -> None:
    with pytest.raises(DeviceFileError, match="does not exist"):
        load_devices(camera.with_name("nowhere.toml"))
    camera.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DeviceFileError, match="is no UTF-8"):
        load_devices(camera)


@pytest.mark.parametrize(
    ("asked", "close"),
    [
        ("raspberry-pi-5", "raspberry-pi-5-8gb"),
        ("iPhone 15", "iphone-15-pro-8gb"),
        ("browser-wasm32", "browser"),
        ("rpi5", "raspberry-pi-5-4gb"),
        ("pi5", "raspberry-pi-5-4gb"),
    ],
)
def test_unknown_devices_name_the_closest(asked: str, close: str) -> None:
    with pytest.raises(UsageError, match=close):
        find_device(asked, load_devices())


def test_a_device_completes_the_request(camera: Path) -> None:
    request = PlanFlags(device="camera", devices=camera).request()
    assert request.format == "gguf"
    assert request.budget_bytes == 429_496_729
    assert request.budget_scope == "process"
    assert request.types == ("q8_0", "q4_0")
    assert request.default_context == 512
    assert request.context is None
    assert request.device == "camera"
    assert request.runtime == "llama.cpp"


def test_limits_of_a_browser_reach_the_request() -> None:
    onnx = PlanFlags(device="browser").request()
    assert (onnx.format, onnx.whole_prompts, onnx.largest_file) == ("onnx", True, 2 * 10**9)
    gguf = PlanFlags(device="browser", format_="gguf").request()
    assert (gguf.whole_prompts, gguf.largest_file) == (False, 2 * 10**9)
    without = PlanFlags(budget=["1GB"], format_="onnx").request()
    assert (without.whole_prompts, without.largest_file) == (False, None)


@pytest.mark.parametrize("flag", ["cache_type", "cache_type_k", "cache_type_v"])
def test_a_browser_has_no_cache_that_its_pages_cannot_make(tmp_path: Path, flag: str) -> None:
    checkpoint = Checkpoint.open(make_model(tmp_path / "m"))
    request = PlanFlags(device="browser").request()
    for backend, own in (("cpu", "f32"), ("webgpu", "f16")):
        asked = replace(request, backend=backend, types=(), **{flag: "auto"})
        assert resolve(asked, checkpoint).caches == ((own, own),)
    with pytest.raises(UnsupportedError, match=r"no KV cache of int8 in browser: .* in f32"):
        resolve(replace(request, **{flag: "int8"}), checkpoint)
    # Nor is one suggested where nothing fits, or would fit better.
    assert list(resolve(request, checkpoint).space.format.cache_types) == ["f32"]
    gguf = PlanFlags(device="browser", format_="gguf", cache_type="q8_0").request()
    assert resolve(gguf, checkpoint).caches == (("q8_0", "q8_0"),)


def test_flags_override_the_device(camera: Path) -> None:
    flags = PlanFlags(
        device="camera", devices=camera, budget=["100MB"], budget_scope="file", types="Q6_K, f16", context="9"
    )
    request = flags.request()
    assert (request.budget_bytes, request.budget_scope, request.types, request.context) == (
        100_000_000,
        "file",
        ("q6_k", "f16"),
        9,
    )
    assert PlanFlags(device="pixel-9-12gb", format_="onnx").request().types[0] == "f32"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "no format"),
        ({"format_": "gguf"}, "--device raspberry-pi-5-8gb"),
        ({"device": "camera", "format_": "onnx"}, "camera runs gguf, not onnx"),
        ({"device": "camera", "budget": ["2GB"]}, "more than camera has"),
        ({"device": "kamera"}, "camera"),
        ({"devices": "here", "budget": ["1GB"], "format_": "gguf"}, "choose one with  --device"),
        ({"device": "camera", "prompt_batch": 0}, "at least 1"),
    ],
)
def test_contradictions(camera: Path, flags: dict[str, Any], says: str) -> None:
    given = {**flags, "devices": camera} if "device" in flags or "devices" in flags else flags
    with pytest.raises(AcipError, match=says) as caught:
        PlanFlags(**given).request()  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
