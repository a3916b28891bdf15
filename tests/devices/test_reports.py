"""What people reported of chips, as speeds to predict with."""

from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest

from acip_export.artifacts.speeds import CacheSpeed, RuntimeSpeed
from acip_export.devices import load_devices
from acip_export.devices.reports import Chip, KnownModel, SpeedReport, reported_speed
from acip_export.formats.registry import export_format

GGUF = export_format("gguf")
ROOT = Path(__file__).parents[2]
SMALL, MIDDLE, LARGE = (
    KnownModel("small", 100_000_000, 24, "config"),
    KnownModel("middle", 1_000_000_000, 22, "config"),
    KnownModel("large", 7_000_000_000, 32, "config"),
)
READ, COMPUTE, LAYER = 1e10, 8e10, 1e-4


def report(model: KnownModel, type_name: str = "q4_0", read: float = READ, off: float = 1.0) -> SpeedReport:
    """What a chip would be reported with that reads and computes so fast, ``off`` by a factor."""
    weight_type = GGUF.type(type_name)
    nbytes = int(model.weights * weight_type.bits_per_weight / 8)
    answer = off / (nbytes / read + model.layers * LAYER)
    return SpeedReport(
        "llama.cpp", model, weight_type, nbytes, off * COMPUTE / 2 / model.weights, answer, "https://example.org"
    )


def rate(speeds: RuntimeSpeed, type_name: str) -> tuple[float, float]:
    (matrix,) = speeds.matrices[type_name]
    return matrix.read, matrix.compute


def test_models_of_several_sizes_tell_reading_from_overhead() -> None:
    speeds = reported_speed([report(model) for model in (SMALL, MIDDLE, LARGE)], ())
    assert speeds.layer_seconds(10**9) == pytest.approx(LAYER)
    assert rate(speeds, "q4_0") == pytest.approx((READ, COMPUTE))
    assert speeds.prompt_error == speeds.answer_error == 0.15  # as much as boards of one kind differ


def test_what_one_model_does_not_tell_is_an_error() -> None:
    speeds = reported_speed([report(MIDDLE)], ())
    one = report(MIDDLE)
    assert one.answer is not None
    layer = speeds.layer_seconds(10**9)
    read, compute = rate(speeds, "q4_0")
    # The reported model is predicted as it was reported; a tenth of its time at most is overhead.
    assert 1 / (one.nbytes / read + MIDDLE.layers * layer) == pytest.approx(one.answer)
    assert 0 < layer <= 1 / one.answer / MIDDLE.layers / 10
    assert compute == pytest.approx(COMPUTE)
    assert speeds.prompt_error == speeds.answer_error == 0.5 and speeds.layer_error == 2
    assert reported_speed([report(SMALL), report(LARGE)], ()).layer_error == 0
    # Two models of one size say no more of it.
    assert reported_speed([report(LARGE), report(LARGE, "q8_0")], ()).layer_error == 2


def test_errors_are_those_of_each_report_predicted_from_the_others() -> None:
    reports = [report(MIDDLE), report(LARGE), report(LARGE, off=0.5)]
    speeds = reported_speed(reports, ())
    # The halved report is predicted twice as fast; of the others, whose mean has it, none is as far off.
    assert speeds.answer_error == pytest.approx(1.0, abs=0.05)
    assert speeds.prompt_error == pytest.approx(1.0)


def test_types_without_reports_have_the_rates_of_the_nearest_in_bits() -> None:
    """As many bytes a second, and below four bits fewer: midway to as many weights."""
    names = ("f16", "q2_k", "q3_k", "q4_1")
    speeds = reported_speed(
        [report(model, name, read) for model in (SMALL, LARGE) for name, read in (("q8_0", READ), ("q4_0", READ / 2))],
        [GGUF.type(name) for name in names],
    )
    assert rate(speeds, "q8_0")[0] == rate(speeds, "f16")[0] == pytest.approx(READ)
    assert rate(speeds, "q4_0")[0] == rate(speeds, "q4_1")[0] == pytest.approx(READ / 2)
    for name in ("q3_k", "q2_k"):
        assert rate(speeds, name)[0] == pytest.approx(READ / 2 * sqrt(GGUF.type(name).bits_per_weight / 4.5))
    assert set(speeds.matrices) == {"q8_0", "q4_0", *names}
    # Caches are read as matrices of their type.
    assert speeds.cache("f16").read == speeds.cache_read == rate(speeds, "f16")[0]
    assert speeds.cache("q4_0") == CacheSpeed(*rate(speeds, "q4_0"))


def test_prompts_and_answers_may_be_of_different_reports() -> None:
    prompt, answer = replace(report(LARGE), answer=None), replace(report(SMALL, "q8_0"), prompt=None)
    speeds = reported_speed([prompt, answer], ())
    assert rate(speeds, "q4_0")[1] == rate(speeds, "q8_0")[1] == pytest.approx(COMPUTE)
    assert speeds.answer_error == speeds.prompt_error == 0.5 and speeds.prompts


def test_without_prompts_only_answers_are_predicted() -> None:
    speeds = reported_speed([replace(report(LARGE), prompt=None)], ())
    assert not speeds.prompts and speeds.prompt_error is None and speeds.answer_error == 0.5


def test_runtimes_are_told_apart() -> None:
    onnx = replace(report(SMALL), runtime="onnxruntime-genai", type=export_format("onnx").type("int4"))
    speeds = Chip("m1", "M1", (report(LARGE), onnx)).speeds({"gguf": [GGUF.type("q6_k")]})
    assert {name: set(each.matrices) for name, each in speeds.items()} == {
        "llama.cpp": {"q4_0", "q6_k"},
        "onnxruntime-genai": {"int4"},
    }


def test_what_is_built_in_says_where_it_is_from_and_is_told_in_the_documents() -> None:
    chips = {device.chip.name: device.chip for device in load_devices().values() if device.chip is not None}
    reports = [report for chip in chips.values() for report in chip.reports]
    for chip in chips.values():
        for report in chip.reports:
            assert "https://" in report.source or report.source.startswith("wardenclaw, "), report
            # Not a file of another type, or of another model: bits of a weight, head and mixed types included.
            bits = 8 * report.nbytes / report.model.weights
            assert 0.95 * report.type.bits_per_weight < bits < 2.5 * report.type.bits_per_weight, report
    written = json.loads((ROOT / "benchmarks" / "reported_speeds.json").read_text(encoding="utf-8"))
    assert {name: len(each) for name, each in written["chips"].items()} == {n: len(c.reports) for n, c in chips.items()}
    page = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    summary = written["predicted_over_reported"]
    for kind, text in (
        ("answer", "half of {} answers are within {:.0f} %, nine of ten within a factor of {}"),
        ("prompt", "of {} prompts half within {:.0f} %, nine of ten within {}"),
    ):
        told = summary[kind]
        assert text.format(told["count"], 100 * told["half_within"] - 100, told["nine_of_ten_within"]) in page
    count = sum(device.chip is not None for device in load_devices().values())
    assert f"on {count} devices" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"from {len(reports)} sourced reports" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
