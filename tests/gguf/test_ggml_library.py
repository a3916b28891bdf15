"""ggml's quantizers: the format table is right, threads change nothing, refusals are clear."""

from __future__ import annotations

from importlib.metadata import version

import gguf
import numpy as np
import pytest
import torch

from acip_export.errors import MissingExtraError, UnsupportedError
from acip_export.weight_types import types_of, weight_type
from benchmarks.format_errors import gaussian, relative_mse
from converters.gguf import converter
from converters.gguf import ggml_library as ggml
from converters.gguf.types import TYPE_IDS

FORMATS = {form.name: form for form in types_of("gguf")}
# Building ggml's lookup tables for these takes seconds.
SLOW = {"iq1_m", "iq1_s", "iq2_s", "iq2_xs"}


# Newer than gguf-py 0.19; what loads ggml compares its sizes with ggml's.
UNKNOWN_TO_GGUF_PY = {"q2_0"}


def test_only_new_types_are_unknown_to_gguf_py() -> None:
    known = {name.lower() for name in gguf.GGMLQuantizationType.__members__}
    assert FORMATS.keys() - known <= UNKNOWN_TO_GGUF_PY


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - UNKNOWN_TO_GGUF_PY))
def test_table_agrees_with_gguf_py(name: str) -> None:
    number = gguf.GGMLQuantizationType[name.upper()]
    assert TYPE_IDS[name] == number
    assert (FORMATS[name].block, FORMATS[name].block_bytes) == gguf.GGML_QUANT_SIZES[number]


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - SLOW))
def test_relative_mse_is_the_measured_one(name: str) -> None:
    form = FORMATS[name]
    # The table rounds to three digits (0.5 %); a block's error varies by tens of percent, over the thousand blocks or
    # so measured here its mean by about 1 %.
    assert relative_mse(form, gaussian()) == pytest.approx(form.relative_mse, rel=0.03)


def test_threads_and_chunks_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.from_numpy(gaussian(96, 512))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(0))
    whole = ggml.quantize(weight, "q4_k", importance, threads=1)
    monkeypatch.setattr(ggml, "_CHUNK_WEIGHTS", 5 * 512)  # 19 chunks and one short one
    assert np.array_equal(ggml.quantize(weight, "q4_k", importance, threads=3), whole)


def test_importance_moves_the_error() -> None:
    weight = torch.from_numpy(gaussian(32, 256))
    importance = torch.ones(256)
    importance[:32] = 100
    plain, weighted = (
        ggml.dequantize(ggml.quantize(weight, "q2_k", chosen), (32, 256), "q2_k") for chosen in (None, importance)
    )
    error = [float(((back - weight.numpy())[:, :32] ** 2).sum()) for back in (plain, weighted)]
    assert error[1] < 0.9 * error[0]


def test_columns_that_were_never_excited_do_not_break_a_quantizer() -> None:
    importance = torch.zeros(256)
    importance[3] = 1.0
    for chosen in (importance, torch.zeros(256)):
        data = ggml.quantize(torch.from_numpy(gaussian(8, 256)), "iq2_xxs", chosen)
        assert np.isfinite(ggml.dequantize(data, (8, 256), "iq2_xxs")).all()


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "f16", "bf16", "f32"])
def test_portable_fallback_gives_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.from_numpy(gaussian(16, 256))
    native = ggml.quantize(weight, name)
    monkeypatch.setattr(ggml, "load_library", lambda: None)
    assert np.array_equal(ggml.quantize(weight, name), native)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "few levels", "zeros", "tiny"])
def test_portable_fallback_weighs_as_ggml_does(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.from_numpy(gaussian(24, 416))  # blocks that end within a row's importance
    if kind == "heavy tails":
        weight = weight**5
    elif kind == "few levels":  # ties between scales
        weight = (2 * weight).round() / 2
    elif kind == "zeros":
        weight[:, :64] = 0
    elif kind == "tiny":
        weight = weight * 1e-16
    importance = torch.rand(416, generator=torch.Generator().manual_seed(1)) ** 4
    native, plain = ggml.quantize(weight, name, importance), ggml.quantize(weight, name)
    assert np.array_equal(native, plain) == (name == "q8_0")
    monkeypatch.setattr(ggml, "load_library", lambda: None)
    assert np.array_equal(ggml.quantize(weight, name, importance), native)


def test_a_library_that_is_not_trusted_is_not_named_as_the_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert converter.quantizer() == f"xllamacpp {version('xllamacpp')}"
    ggml.load_library.cache_clear()
    monkeypatch.setattr(ggml, "_self_check", lambda _library: "other blocks")
    try:
        named = converter.quantizer()
    finally:
        ggml.load_library.cache_clear()
    assert named == f"gguf {version('gguf')}"


def test_other_types_need_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "load_library", lambda: None)
    with pytest.raises(MissingExtraError, match=r"q4_k.*\n.*acip-export\[gguf\]"):
        ggml.quantize(torch.zeros(1, 256), "q4_k")


def test_a_library_with_other_block_sizes_is_refused() -> None:
    class Changed:
        ggml_blck_size = staticmethod(lambda _number: 64)
        ggml_type_size = staticmethod(lambda _number: 34)

    assert "expected" in str(ggml._self_check(Changed()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "name", "importance", "message"),
    [
        (torch.zeros(2, 100), "q4_k", None, "do not fit q4_k blocks of 256"),
        (torch.zeros(2, 256), "iq2_xxs", None, "needs importance"),
        (torch.full((2, 256), 1e6), "f16", None, "too large for f16"),
    ],
)
def test_refusals(weight: torch.Tensor, name: str, importance: None, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ggml.quantize(weight, name, importance)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_zero_bytes_are_zero_weights(name: str) -> None:
    """The adapter layout's base relies on it."""
    form = weight_type("gguf", name)
    assert not ggml.dequantize(np.zeros(form.nbytes(3, 256), np.uint8), (3, 256), name).any()
