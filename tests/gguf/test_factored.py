"""Factor pairs in one GGUF file, run by llama.cpp with our extension, against the bundle in PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from acip_export.artifacts.bundle import load_bundle
from acip_export.artifacts.plan import Serving
from acip_export.errors import MissingExtraError, UnsupportedError, VerificationError
from acip_export.model.checkpoint import Checkpoint
from converters.gguf import converter
from converters.gguf.arrange import ADAPTER_FILE, FACTORED_ARCHITECTURES, MODEL_FILE
from converters.gguf.format import GGUF
from converters.gguf.run_commands import run_commands
from converters.gguf.runtimes import c_api as llama_capi
from converters.gguf.runtimes import llama_cpp
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from converters.gguf.writer import GgufWriter, TensorSpec, float32, string
from tests.gguf.conftest import Rule, export
from tests.gguf.test_converter import FLOAT_TOLERANCE, agreement, assert_float_agreement
from tests.gguf.test_families import CASES, GELU_TOLERANCE, SIZES
from tests.support import dense, everywhere, make_model, make_plan, needs_factor_pairs

RANK = 64
RUNTIME = Serving(64, "f16", 16)
# Types of up and of down. Rows of up have as many columns as the rank: too few here for the K-quants.
TYPES = (("q8_0", "q8_0"), ("f16", "q4_k"), ("q4_0", "q4_0"), ("iq4_nl", "iq4_xs"), ("q5_0", "q2_k"))
# Beside rounded weights llama.cpp rounds activations to eight bits, which costs at most 3e-5 nats here, for dense
# weights and for pairs. A factor left out, swapped or scaled costs thousands of times as much.
ACTIVATION_KL = 1e-4


def pairs(up: str, down: str, rank: int = RANK) -> Rule:
    return everywhere(representation="factored", rank=rank, up_type=up, down_type=down, embedding_type="f32")


@needs_factor_pairs
@pytest.mark.parametrize("arch", FACTORED_ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:.*rope.*")  # transformers comments on our tiny lengths
def test_float_pairs_are_the_bundle(arch: str, tmp_path: Path) -> None:
    kind, settings = CASES.get(arch, (arch, {}))
    model = make_model(tmp_path / "model", kind, seed=1, **{**SIZES, **settings})
    bundle, out = export(model, "factored", pairs("f32", "f32", 32), tmp_path)
    assert [path.name for path in out.iterdir()] == [MODEL_FILE]
    # Prompts in batches of 16 and a continuation token by token.
    found = agreement(load_bundle(bundle.path), out)
    assert_float_agreement(found, GELU_TOLERANCE if "gemma" in kind else FLOAT_TOLERANCE)


@needs_factor_pairs
@pytest.mark.parametrize("arch", FACTORED_ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_quantized_pairs_are_the_numbers_in_the_file(arch: str, tmp_path: Path) -> None:
    kind, settings = CASES.get(arch, (arch, {}))
    model = make_model(tmp_path / "model", kind, seed=1, **{**SIZES, **settings})
    check_quantized(model, "q4_0", "q8_0", tmp_path, 32)


@needs_factor_pairs
@pytest.mark.parametrize(("up", "down"), TYPES)
def test_every_kind_of_type(up: str, down: str, models: dict[str, Path], tmp_path: Path) -> None:
    check_quantized(models["llama"], up, down, tmp_path)


def check_quantized(model: Path, up: str, down: str, directory: Path, rank: int = RANK) -> None:
    bundle, out = export(model, "factored", pairs(up, down, rank), directory)
    found = agreement(load_bundle(bundle.path, converter.round_trip), out)
    assert found.mean_kl <= ACTIVATION_KL
    # The measure has to tell: against the unrounded bundle, weights of eight bits and fewer are visible.
    assert agreement(load_bundle(bundle.path), out).mean_kl > found.mean_kl


@needs_factor_pairs
def test_k_quants_for_both_factors(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", hidden_size=512, num_attention_heads=8, num_hidden_layers=1)

    def rule(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        # Keys and values have 128 rows: no rank of 256 fits below that.
        wide = min(shape) > 256
        return pairs("q4_k", "q6_k", 256)(name, shape) if wide else dense(type="f32")(name, shape)

    bundle, out = export(model, "factored", rule, tmp_path)
    assert agreement(load_bundle(bundle.path, converter.round_trip), out).mean_kl <= ACTIVATION_KL


@needs_factor_pairs
def test_factored_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Checkpoint.__dict__["linear_modules"].func
    # No ranking touches the head; the format and the runtime carry it all the same.
    monkeypatch.setattr(Checkpoint, "linear_modules", property(lambda self: linear(self) | {"lm_head": (512, 256)}))
    model = make_model(tmp_path / "model", "qwen3", tie_word_embeddings=False)

    def rule(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        return pairs("f32", "f32")("head" if "lm_head" in name else name, shape)

    bundle, out = export(model, "factored", rule, tmp_path)
    assert "output.weight.lora_b" in {tensor.name for tensor in gguf.GGUFReader(out / MODEL_FILE).tensors}
    assert_float_agreement(agreement(load_bundle(bundle.path), out))


@needs_factor_pairs
def test_lora_on_top_of_factored_and_dense_weights(models: dict[str, Path], tmp_path: Path) -> None:
    factored = pairs("f32", "f32")

    def rule(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        return dense(type="f32")(name, shape) if "layers.1" in name else factored(name, shape)

    bundle, out = export(models["llama"], "factored", rule, tmp_path)
    model = load_bundle(bundle.path)
    before = agreement(model, out)
    targets = {
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj",
    }
    generator, tensors = np.random.default_rng(2), {}
    shapes = {decision.module: decision.shape for decision in bundle.plan.tensors}
    for name, module in targets.items():
        rows, columns = shapes[module]
        a, b = (generator.normal(0, 0.2, shape).astype(np.float32) for shape in ((8, columns), (rows, 8)))
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        change = torch.from_numpy(b @ a)
        model.get_submodule(module).register_forward_hook(lambda _, x, y, change=change: y + x[0] @ change.T)
    specs = [TensorSpec(name, numbers.shape, "f32") for name, numbers in tensors.items()]
    head = {"general.architecture": string("llama"), "general.type": string("adapter"), "adapter.type": string("lora")}
    with GgufWriter(out / ADAPTER_FILE, head | {"adapter.lora.alpha": float32(0.0)}, specs) as writer:
        for name, numbers in tensors.items():
            writer.write(name, numbers.reshape(-1).view(np.uint8))
    assert_float_agreement(before)
    assert_float_agreement(agreement(model, out))
    (out / ADAPTER_FILE).unlink()
    assert agreement(model, out).max_logit_difference > 100 * FLOAT_TOLERANCE


@needs_factor_pairs
@pytest.mark.parametrize("layout", ["stock", "lora"])
def test_the_extended_library_runs_ordinary_exports_unchanged(
    layout: str, models: dict[str, Path], tmp_path: Path
) -> None:
    rules = {
        "stock": dense(type="q4_k", embedding_type="q8_0"),
        "lora": everywhere(
            representation="lora",
            type="q1_0",
            rank=64,
            up_type="q8_0",
            down_type="q8_0",
            embedding_type="f32",
        ),
    }
    _, out = export(models["qwen3"], layout, rules[layout], tmp_path)
    windows = np.random.default_rng(3).integers(3, 512, (1, 48))
    found = []
    for extended in (False, True):
        with LlamaCppSession(out, RUNTIME, threads=1, extended=extended) as session:
            found.append((next(session.logits(windows)), session.greedy([5, 6, 7], 12)))
    # Two builds of two versions: sums in another order, activations rounded to eight bits at other places.
    assert np.abs(found[0][0] - found[1][0]).max() <= 5e-2
    assert found[0][1] == found[1][1]


@needs_factor_pairs
def test_memory_formulas_hold_for_pairs(models: dict[str, Path], tmp_path: Path) -> None:
    bundle, out = export(models["llama"], "factored", pairs("q8_0", "q8_0"), tmp_path)
    weights = sum(decision.nbytes for decision in bundle.plan.tensors)
    for runtime in (Serving(64, "f16", 16), Serving(256, "q8_0", 128)):
        expected = GGUF.memory.serving(Checkpoint.open(models["llama"]).shape, runtime)
        with LlamaCppSession(out, runtime, threads=1) as session:
            assert session.buffers is not None
            assert session.buffers.compute <= expected.compute + 0.01 * 2**20  # it logs hundredths of a MiB
            # From the first page of the weights to the last.
            assert weights - 2**14 <= session.buffers.model <= weights + 2**16


@needs_factor_pairs
def test_the_printed_python_runs(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, out = export(models["llama"], "factored", pairs("q8_0", "q8_0"), tmp_path)
    plan = dataclasses.replace(bundle.plan, files={MODEL_FILE: 1})
    text = {command.program: command.text for command in run_commands(plan, out)}["llama-cpp-python"]
    scope: dict[str, Any] = {}
    exec(text, scope)
    scope["model"].close()
    assert capsys.readouterr().out.strip()


@needs_factor_pairs
def test_a_pair_without_its_second_half_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    _, out = export(models["llama"], "factored", pairs("q8_0", "q8_0"), tmp_path)
    file = out / MODEL_FILE
    file.write_bytes(file.read_bytes().replace(b"blk.0.ffn_up.weight.lora_b", b"blk.0.ffn_up.weight.lora_x"))
    with pytest.raises(VerificationError, match=r"(?s)cannot be loaded.*blk\.0\.ffn_up\.weight\.lora_b"):
        LlamaCppSession(out, RUNTIME, threads=1)


def test_without_the_extension_the_message_says_how_to_get_it(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = export(models["llama"], "factored", pairs("q8_0", "q8_0"), tmp_path)
    monkeypatch.setattr(llama_capi, "find", lambda extended: None if extended else pytest.fail("a stock one"))
    with pytest.raises(MissingExtraError, match=r"(?s)llama\.cpp with our extension.*" + llama_cpp.BUILD_COMMAND):
        LlamaCppSession(out, RUNTIME)


def test_stock_llama_cpp_refuses_pairs_in_words(models: dict[str, Path], tmp_path: Path) -> None:
    _, out = export(models["llama"], "factored", pairs("q8_0", "q8_0"), tmp_path)
    with pytest.raises(VerificationError, match=r"(?s)cannot be loaded.*'blk\.0\.attn_q\.weight' not found"):
        LlamaCppSession(out, RUNTIME, extended=False)


def test_the_version_is_written_only_where_pairs_are(models: dict[str, Path], tmp_path: Path) -> None:
    for name, rule, expected in (("pairs", pairs("q8_0", "q8_0"), 1), ("none", dense(type="q8_0"), None)):
        (tmp_path / name).mkdir()
        _, out = export(models["qwen2"], "factored", rule, tmp_path / name)
        field = gguf.GGUFReader(out / MODEL_FILE).fields.get("acip.factored.version")
        assert (field and field.contents()) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 256, "up_type": "q8_0", "down_type": "q8_0"}, "rank 256 is not below its 256 rows"),
        ({"rank": 40, "up_type": "q8_0", "down_type": "q8_0"}, "rows of 40 weights do not fit q8_0"),
        ({"rank": 64, "up_type": "q4_k", "down_type": "q4_k"}, "rows of 64 weights do not fit q4_k"),
        ({"rank": 64, "up_type": None, "down_type": "q8_0"}, "no type None"),
    ],
)
def test_pairs_that_cannot_be_written_are_refused(
    fields: dict[str, Any], message: str, models: dict[str, Path]
) -> None:
    plan = make_plan(models["llama"], "gguf", "factored", dense(type="q8_0"))
    tensors = tuple(
        dataclasses.replace(t, representation="factored", type=None, **fields)
        if t.name == "model.layers.0.mlp.down_proj.weight"
        else t
        for t in plan.tensors
    )
    with pytest.raises(UnsupportedError, match=message):
        converter.predict_files(Checkpoint.open(models["llama"]), "factored", tensors, RUNTIME)


def test_other_architectures_are_refused_by_name(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.gguf.arrange.FACTORED_ARCHITECTURES", ("qwen3",))
    plan = make_plan(models["llama"], "gguf", "factored", dense(type="q8_0"))
    with pytest.raises(UnsupportedError, match=r"'llama' has not been seen to run factor pairs.*Tested: qwen3"):
        converter.predict_files(Checkpoint.open(models["llama"]), "factored", plan.tensors, RUNTIME)
