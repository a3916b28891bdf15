"""The runtime adapter: both ways of access agree, its memory figures are the planner's, refusals are quoted."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from acip_export.artifacts.plan import Serving
from acip_export.errors import MissingExtraError, VerificationError
from acip_export.formats.session import Logits
from acip_export.verification.metrics import compare_logits, log_softmax
from converters.gguf.memory import CACHE_TYPES
from converters.gguf.runtimes import c_api as llama_capi
from converters.gguf.runtimes import llama_cpp
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from converters.gguf.runtimes.llama_native import BufferSizes
from converters.gguf.runtimes.llama_server import ServerSession
from tests.gguf.conftest import export
from tests.support import CORPUS, dense, everywhere

RUNTIME = Serving(128, "f32", 32)


@pytest.fixture(scope="module")
def stock(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(models["llama"], "stock", dense(type="f32"), tmp_path_factory.mktemp("stock"))[1]


@pytest.fixture(scope="module")
def lora(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    rule = everywhere(representation="lora", type="q1_0", rank=32, up_type="f32", down_type="f32", embedding_type="f32")
    return export(models["llama"], "lora", rule, tmp_path_factory.mktemp("lora"))[1]


@pytest.mark.parametrize("layout", ["stock", "lora"])
def test_server_and_c_interface_agree(layout: str, request: pytest.FixtureRequest) -> None:
    out = request.getfixturevalue(layout)
    windows = np.random.default_rng(0).integers(0, 512, (1, 20))
    with LlamaCppSession(out, RUNTIME, threads=1) as native, ServerSession(out, RUNTIME, 1) as server:
        assert native.name != server.name
        mine, theirs = list(native.logits(windows)), list(server.logits(windows))
        found = compare_logits(mine, theirs, (native.greedy([5, 6, 7], 8), server.greedy([5, 6, 7], 8)))
        assert all(native.tokenize(text) == server.tokenize(text) for text in CORPUS)
        assert server.speed([5] * 16, 4).decode > 0
    # The server decodes position by position: the same sums in another order.
    assert found.max_logit_difference < 5e-3
    assert found.greedy_equal == 8
    assert np.abs(log_softmax(mine[0]) - theirs[0]).max() < 5e-3


def test_prompt_batch_does_not_change_the_numbers(stock: Path) -> None:
    windows = np.random.default_rng(2).integers(0, 512, (1, 100))
    found = []
    for batch in (100, 7):
        with LlamaCppSession(stock, dataclasses.replace(RUNTIME, prompt_batch=batch), threads=1) as session:
            found.append(next(iter(session.logits(windows))))
    assert found[0].shape == (100, 512)
    assert found[0].dtype == np.float32
    np.testing.assert_allclose(found[0], found[1], atol=5e-3)  # other matrix kernels, other order of sums


def test_a_package_that_is_not_installed_is_no_news(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is, and cannot be loaded, is said."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # its import fails
    monkeypatch.setattr(llama_capi, "find_spec", lambda _: "there")
    assert llama_capi._llama_cpp_python() is None
    assert "llama-cpp-python cannot be used" in caplog.text
    caplog.clear()
    monkeypatch.setattr(llama_capi, "find_spec", lambda _: None)
    assert llama_capi._llama_cpp_python() is None
    assert not caplog.text


def test_windows_do_not_see_each_other(stock: Path) -> None:
    windows = np.random.default_rng(3).integers(0, 512, (2, 40))
    with LlamaCppSession(stock, RUNTIME, threads=1) as session:
        together = list(session.logits(windows))
        alone = next(iter(session.logits(windows[1:])))
    np.testing.assert_array_equal(together[1], alone)


def test_every_type_of_cache_is_used(stock: Path) -> None:
    """Each on either side: it rounds as much as its bits say, and not what the other side keeps."""
    windows = np.random.default_rng(4).integers(0, 512, (1, 64))

    def logits(keys: str, values: str) -> Logits:
        serving = dataclasses.replace(RUNTIME, cache_type_k=keys, cache_type_v=values)
        with LlamaCppSession(stock, serving, threads=1) as session:
            return next(iter(session.logits(windows)))

    exact = logits("f16", "f16")
    errors = {
        side: {name: float(np.abs(logits(*pair(name)) - exact).mean()) for name in CACHE_TYPES}
        for side, pair in (("k", lambda name: (name, "f16")), ("v", lambda name: ("f16", name)))
    }
    for of_side in errors.values():
        assert of_side["f16"] == 0
        assert of_side["bf16"] > 0 and 0 < of_side["q8_0"] < 0.5 * of_side["q5_1"]
        assert of_side["q5_0"] < 0.8 * of_side["q4_0"] < 0.2
        assert len(set(of_side.values())) >= len(CACHE_TYPES) - 1  # f32 is rounded to float16 all the same


def test_weights_are_mapped_and_not_repacked(models: dict[str, Path], tmp_path: Path) -> None:
    bundle, out = export(models["llama"], "stock", dense(type="q4_0"), tmp_path)
    with LlamaCppSession(out, RUNTIME, threads=1) as session:
        assert session.buffers is not None
        weights = sum(decision.nbytes for decision in bundle.plan.tensors)
        # From the first page of the weights to the last; a repacked copy would nearly double it.
        assert weights - 2**14 <= session.buffers.model <= weights + 2**16


def test_buffer_lines_are_added_up() -> None:
    log = [
        "load_tensors:   CPU_Mapped model buffer size =    98.62 MiB",
        "load_tensors:   CPU_REPACK model buffer size =    94.50 MiB",
        "llama_kv_cache:        CPU KV buffer size =     8.00 MiB",
        "sched_reserve:        CPU compute buffer size =    51.01 MiB",
        "llama_context:        CPU  output buffer size =     0.25 MiB",
        "something else",
    ]
    log += ["sched_reserve:        CPU compute buffer size =    52.00 MiB"]  # grown, not another one
    mebibyte = 2**20
    assert BufferSizes.parse(log) == BufferSizes(
        round(193.12 * mebibyte), 0, 8 * mebibyte, 52 * mebibyte, mebibyte // 4
    )


def test_adapter_memory_is_counted(lora: Path) -> None:
    with LlamaCppSession(lora, RUNTIME, threads=1) as session:
        assert session.buffers is not None
        written = (lora / "adapter.gguf").stat().st_size
        assert session.buffers.adapter == pytest.approx(written, rel=0.02)


def test_damaged_files_are_refused_with_llama_cpps_words(stock: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes((stock / "model.gguf").read_bytes()[:200_000])
    with pytest.raises(VerificationError, match=r"cannot be loaded; llama\.cpp says:\n.*"):
        LlamaCppSession(tmp_path, RUNTIME)
    (tmp_path / "model.gguf").write_bytes((stock / "model.gguf").read_bytes())
    (tmp_path / "adapter.gguf").write_bytes((lora / "adapter.gguf").read_bytes()[:1000])
    with pytest.raises(VerificationError, match=r"adapter\.gguf cannot be loaded"):
        LlamaCppSession(tmp_path, RUNTIME)


def test_windows_longer_than_the_context_are_refused(stock: Path) -> None:
    with (
        LlamaCppSession(stock, RUNTIME, threads=1) as session,
        pytest.raises(VerificationError, match="129 tokens do not fit"),
    ):
        next(session.logits(np.zeros((1, 129), np.int64)))


def test_speed_is_measured(stock: Path) -> None:
    with LlamaCppSession(stock, RUNTIME, threads=1) as session:
        speed = session.speed([5] * 32, 4)
    assert speed.prefill > speed.decode > 0


def test_log_goes_to_logging_only(
    stock: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, llama_capi.__name__), LlamaCppSession(stock, RUNTIME, threads=1):
        pass
    assert any("KV buffer size" in record.message for record in caplog.records)
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out == ""


def test_a_library_with_moved_fields_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llama_capi._CONTEXT_DEFAULTS, "n_ubatch", 511)
    assert llama_capi._xllamacpp() is None


def test_without_any_runtime_the_message_says_what_to_install(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_capi, "find", lambda _extended: None)
    monkeypatch.setattr(llama_cpp, "library_path", lambda: None)
    with pytest.raises(MissingExtraError, match=r"acip-export\[gguf\]"):
        LlamaCppSession(stock, RUNTIME)


def test_hidden_symbols_lead_to_the_server(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_capi, "find", lambda _extended: None)
    with LlamaCppSession(stock, RUNTIME, threads=1) as session:
        assert "server" in session.name
        assert session.buffers is None
        assert len(session.greedy([1, 2], 2)) == 2
