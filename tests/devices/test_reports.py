"""What people reported of chips, as speeds to predict with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from acip_export.artifacts.speeds import RuntimeSpeed
from acip_export.devices.reports import Chip, KnownModel, SpeedReport, reported_speed
from acip_export.formats.registry import export_format

GGUF = export_format("gguf")
SMALL, MIDDLE, LARGE = (
    KnownModel("small", 100_000_000, 30_000_000, 24, "config"),
    KnownModel("middle", 1_000_000_000, 60_000_000, 22, "config"),
    KnownModel("large", 7_000_000_000, 130_000_000, 32, "config"),
)
READ, COMPUTE, LAYER = 1e10, 8e10, 1e-4


def report(model: KnownModel, type_name: str = "q4_0", read: float = READ, off: float = 1.0) -> SpeedReport:
    """What a chip would be reported with that reads and computes so fast, ``off`` by a factor."""
    weight_type = GGUF.type(type_name)
    nbytes = int((model.weights + model.head) * weight_type.bits_per_weight / 8)
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
    assert speeds.prompt_error == speeds.answer_error == 0.5 and speeds.layer_error == 1
    assert reported_speed([report(SMALL), report(LARGE)], ()).layer_error == 0
    # Two models of one size say no more of it.
    assert reported_speed([report(LARGE), report(LARGE, "q8_0")], ()).layer_error == 1


def test_errors_are_those_of_each_report_predicted_from_the_others() -> None:
    reports = [report(MIDDLE), report(LARGE), report(LARGE, off=0.5)]
    speeds = reported_speed(reports, ())
    # The halved report is predicted twice as fast; of the others, whose mean has it, none is as far off.
    assert speeds.answer_error == pytest.approx(1.0, abs=0.05)
    assert speeds.prompt_error == pytest.approx(1.0)


def test_types_without_reports_have_the_rates_of_the_nearest_in_bits() -> None:
    """As many bytes a second, and below four bits as many weights: their codes take longer to unpack than to read."""
    names = ("f16", "q2_k", "q3_k", "q4_1")
    speeds = reported_speed(
        [report(model, name, read) for model in (SMALL, LARGE) for name, read in (("q8_0", READ), ("q4_0", READ / 2))],
        [GGUF.type(name) for name in names],
    )
    assert rate(speeds, "q8_0")[0] == rate(speeds, "f16")[0] == pytest.approx(READ)
    assert rate(speeds, "q4_0")[0] == rate(speeds, "q4_1")[0] == pytest.approx(READ / 2)
    for name in ("q3_k", "q2_k"):
        assert rate(speeds, name)[0] == pytest.approx(READ / 2 * GGUF.type(name).bits_per_weight / 4.5)
    assert set(speeds.matrices) == {"q8_0", "q4_0", *names}
    assert speeds.cache_read == rate(speeds, "q2_k")[0]  # as the slowest: a cache is read no faster


def test_prompts_and_answers_may_be_of_different_reports() -> None:
    prompt, answer = replace(report(LARGE), answer=None), replace(report(SMALL, "q8_0"), prompt=None)
    speeds = reported_speed([prompt, answer], ())
    assert rate(speeds, "q4_0")[1] == rate(speeds, "q8_0")[1] == pytest.approx(COMPUTE)
    assert speeds.answer_error == speeds.prompt_error == 0.5 and speeds.prompts


def test_without_prompts_only_answers_are_predicted() -> None:
    speeds = reported_speed([replace(report(LARGE), prompt=None)], ())
    assert not speeds.prompts


def test_runtimes_are_told_apart() -> None:
    onnx = replace(report(SMALL), runtime="onnxruntime-genai", type=export_format("onnx").type("int4"))
    speeds = Chip("m1", "M1", (report(LARGE), onnx)).speeds({"gguf": [GGUF.type("q6_k")]})
    assert {name: set(each.matrices) for name, each in speeds.items()} == {
        "llama.cpp": {"q4_0", "q6_k"},
        "onnxruntime-genai": {"int4"},
    }
