"""Both layouts against the bundle in PyTorch, byte for byte against the prediction, and refusals before writing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from acip_export.artifacts.bundle import Bundle, load_bundle
from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.plan import Serving
from acip_export.artifacts.report import Agreement
from acip_export.errors import UnsupportedError, VerificationError
from acip_export.io.atomic import new_directory
from acip_export.materialization import materialize_bundle
from acip_export.model.checkpoint import Checkpoint
from acip_export.rounding import side_by_side
from acip_export.verification.metrics import compare_logits
from converters.gguf import converter, readback
from converters.gguf import ggml_library as ggml
from converters.gguf.arrange import Item
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from tests.gguf.conftest import ARCHITECTURES, export
from tests.support import dense, everywhere, make_bundle, make_model, make_plan, make_scores

# Float32 throughout (no flash attention, which rounds keys and values to float16): only the order of sums differs.
# The bar for float exports as they are served is 2e-2.
FLOAT_TOLERANCE, SERVED_TOLERANCE = 2e-4, 2e-2
# Float16 weights, and the activations that meet them, are rounded to eleven bits; logits are of the order of 1.
HALF_TOLERANCE = 5e-3
CONTEXT = 64


def agreement(model: torch.nn.Module, out: Path, cache_type: str = "f32") -> Agreement:
    """llama.cpp against PyTorch on random tokens, and on a greedy continuation."""
    runtime = Serving(CONTEXT, cache_type, 16)
    windows = np.random.default_rng(1).integers(3, 512, (2, 48))
    prompt = [int(token) for token in windows[0, :12]]
    with torch.no_grad():
        reference = model(torch.from_numpy(windows)).logits.numpy()
        tokens = list(prompt)
        while len(tokens) < 28:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    with LlamaCppSession(out, runtime, threads=1, flash_attention=cache_type != "f32") as session:
        return compare_logits(reference, session.logits(windows), (tokens[12:], session.greedy(prompt, 16)))


def assert_float_agreement(found: Agreement, tolerance: float = FLOAT_TOLERANCE) -> None:
    assert found.max_logit_difference <= tolerance
    assert found.greedy_equal == found.greedy_tokens


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_stock_float_export_is_the_bundle(arch: str, models: dict[str, Path], tmp_path: Path) -> None:
    bundle, out = export(models[arch], "stock", dense(type="f32"), tmp_path)
    assert_float_agreement(agreement(load_bundle(bundle.path), out))
    assert_float_agreement(agreement(load_bundle(bundle.path), out, cache_type="f16"), SERVED_TOLERANCE)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", ["f32", "f16"])
def test_adapter_layout_is_the_bundle(arch: str, form: str, models: dict[str, Path], tmp_path: Path) -> None:
    rule = everywhere(representation="lora", type="q1_0", rank=64, up_type=form, down_type=form, embedding_type="f32")
    bundle, out = export(models[arch], "lora", rule, tmp_path)
    assert {path.name for path in out.iterdir()} == {"model.gguf", "adapter.gguf"}
    assert_float_agreement(
        agreement(load_bundle(bundle.path), out), {"f32": FLOAT_TOLERANCE, "f16": HALF_TOLERANCE}[form]
    )


def test_all_threads_prepare_and_half_of_them_round(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two matrices at once, for the bytes of one at a time; what is known of inputs depends on the threads."""
    prepared, seen = converter._prepared, {"prepare": set[int](), "round": set[int]()}

    def noted(model: MaterializedModel, changes: Any, item: Item) -> Callable[[], ggml.Bytes]:
        seen["prepare"].add(torch.get_num_threads())
        finish = prepared(model, changes, item)

        def finished() -> ggml.Bytes:
            seen["round"].add(torch.get_num_threads())
            return finish()

        return finished

    monkeypatch.setattr(converter, "_prepared", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        _, out = export(models["llama"], "stock", dense(type="q4_k"), tmp_path / "two")
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert seen == {"prepare": {4}, "round": {2}}
    monkeypatch.setattr(side_by_side, "_SIDE_BY_SIDE", 1)
    _, alone = export(models["llama"], "stock", dense(type="q4_k"), tmp_path / "one")
    assert (alone / "model.gguf").read_bytes() == (out / "model.gguf").read_bytes()


def test_untied_head_other_head_size_and_attention_bias(tmp_path: Path) -> None:
    model = make_model(
        tmp_path / "model", "llama", tie_word_embeddings=False, head_dim=32, attention_bias=True, rope_theta=5e5
    )
    bundle, out = export(model, "stock", dense(type="f32"), tmp_path)
    assert_float_agreement(agreement(load_bundle(bundle.path), out))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["linear", "llama3"],
)
def test_scaled_rotary_embeddings(scaling: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", rope_parameters={"rope_theta": 10000.0, **scaling})
    bundle, out = export(model, "stock", dense(type="f32"), tmp_path)
    assert_float_agreement(agreement(load_bundle(bundle.path), out))


@pytest.mark.parametrize("form", ["q8_0", "q4_k"])
def test_quantized_export_is_the_dequantized_bundle(form: str, models: dict[str, Path], tmp_path: Path) -> None:
    bundle, out = export(models["llama"], "stock", dense(type=form), tmp_path)
    reference = load_bundle(bundle.path)
    plain = agreement(reference, out)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 2:
                data = ggml.quantize(parameter, form, bundle.importance(name))
                parameter.copy_(torch.from_numpy(ggml.dequantize(data, tuple(parameter.shape), form)))
    rounded = agreement(reference, out)
    # llama.cpp also rounds activations to eight bits; that is small against q4_k's error of the weights. q8_0's own
    # error is of the same size as the activations', so there only a bound holds.
    assert rounded.mean_kl < (0.25 * plain.mean_kl if form == "q4_k" else 1e-4)
    assert rounded.same_top >= 0.9


def test_adapter_with_a_residual_base(models: dict[str, Path], tmp_path: Path) -> None:
    """Base and pair add up, in the bundle and in llama.cpp, to the weight."""
    rule = everywhere(
        representation="residual", type="f16", rank=32, up_type="f32", down_type="f32", embedding_type="f32"
    )
    bundle, out = export(models["llama"], "lora", rule, tmp_path)
    assert_float_agreement(agreement(load_bundle(bundle.path), out), HALF_TOLERANCE)
    assert_float_agreement(agreement(load_bundle_of_model(models["llama"]), out), HALF_TOLERANCE)


def test_a_correction_takes_away_rounding(models: dict[str, Path], tmp_path: Path) -> None:
    """Base and correction are fitted to ggml's quantizers; llama.cpp runs what the rounded bundle is."""
    fields = {"representation": "residual", "rank": 64, "up_type": "q8_0", "down_type": "q8_0"}
    model, dense_model = models["llama"], load_bundle_of_model(models["llama"])
    found = {}
    for name, rule in {
        "alone": everywhere(representation="dense", type="q2_k", embedding_type="f16"),
        "corrected": everywhere(type="q2_k", embedding_type="f16", **fields),
    }.items():
        plan = make_plan(model, "gguf", "lora", rule)
        checkpoint, scores = Checkpoint.open(model), make_scores(model)
        materialize_bundle(checkpoint, scores, plan, tmp_path / name / "bundle", round_trip=converter.round_trip)
        bundle = Bundle.open(tmp_path / name / "bundle")
        with new_directory(tmp_path / name / "export") as out:
            converter.convert(bundle, out, lambda _: None)
        reference = agreement(load_bundle(bundle.path, converter.round_trip), tmp_path / name / "export")
        found[name] = agreement(dense_model, tmp_path / name / "export").mean_kl
        assert reference.mean_kl < 0.1 * found[name]  # activations of eight bits, against weights of two
    # Rank 64 of 256 with identity moments: the pair holds the top quarter of the weight's falling spectrum.
    assert found["corrected"] < 0.6 * found["alone"]


def load_bundle_of_model(model: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return loaded


SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_hidden_layers": 1}),
    ("llama", {"num_hidden_layers": 11, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32}),
    ("llama", {"num_hidden_layers": 1, "vocab_size": 700, "hidden_size": 128, "intermediate_size": 384}),
    ("qwen2", {"num_hidden_layers": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}),
]
RULES: dict[str, tuple[str, Callable[..., Any]]] = {
    "f32": ("stock", dense(type="f32")),
    "q4_0": ("stock", dense(type="q4_0")),
    "q8_0 of f16 embeddings": ("stock", dense(type="q8_0", embedding_type="f16")),
    "pairs": (
        "lora",
        everywhere(
            representation="lora",
            type="q1_0",
            rank=32,
            up_type="q4_0",
            down_type="q8_0",
            embedding_type="q8_0",
        ),
    ),
    "corrected bases": (
        "lora",
        everywhere(
            representation="residual",
            type="q4_0",
            rank=8,
            up_type="f16",
            down_type="f16",
            embedding_type="q8_0",
        ),
    ),
    "adapter without pairs": ("lora", dense(type="q8_0")),
}


@pytest.mark.parametrize(("arch", "overrides"), SHAPES, ids=str)
def test_written_bytes_are_the_predicted_ones(arch: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", arch, **overrides)
    scores = make_scores(model)
    for index, (layout, rule) in enumerate(RULES.values()):
        plan = make_plan(model, "gguf", layout, rule)
        predicted = converter.predict_files(Checkpoint.open(model), layout, plan.tensors, plan.serving)
        bundle = make_bundle(model, plan, tmp_path / f"bundle{index}", scores)
        with new_directory(tmp_path / f"export{index}") as out:
            converter.convert(bundle, out, lambda _: None)
            assert {file.name: file.stat().st_size for file in out.iterdir()} == predicted


def test_prediction_writes_nothing_and_reads_no_weights(models: dict[str, Path], tmp_path: Path) -> None:
    plan = make_plan(models["llama"], "gguf", "stock", dense(type="q8_0"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((models["llama"] / name).read_bytes())
    checkpoint = Checkpoint(tmp_path, Checkpoint.open(models["llama"]).config, {})
    before = sorted(tmp_path.iterdir())
    converter.predict_files(checkpoint, "stock", plan.tensors, plan.serving)
    assert sorted(tmp_path.iterdir()) == before


def test_metadata_says_what_and_from_where(models: dict[str, Path], tmp_path: Path) -> None:
    bundle, out = export(models["qwen2"], "stock", dense(type="q4_k", embedding_type="q8_0"), tmp_path)
    fields = gguf.GGUFReader(out / "model.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if not key.startswith("tokenizer.")}
    assert found["general.architecture"] == "qwen2"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_S
    assert found["qwen2.context_length"] == 256
    assert found["acip.model_fingerprint"] == bundle.plan.model_fingerprint
    assert len(found["acip.plan_sha256"]) == 64
    assert set(found["acip.plan_sha256"]) != {"0"}


def decide(**fields: Any) -> Callable[[str, tuple[int, ...]], dict[str, Any]]:
    """Only the first down projection differs from q8_0."""

    def rule(name: str, _shape: tuple[int, ...]) -> dict[str, Any]:
        chosen = name == "model.layers.0.mlp.down_proj.weight"
        return {"representation": "dense", "type": "q8_0", **(fields if chosen else {})}

    return rule


PAIR = {"rank": 64, "up_type": "q8_0", "down_type": "q8_0"}


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("stock", {"representation": "factored", "type": None, **PAIR}, "layout 'stock' of GGUF cannot hold"),
        ("stock", {"representation": "lora", "type": "q1_0", **PAIR}, "layout 'stock' of GGUF cannot hold"),
        ("lora", {"representation": "factored", "type": None, **PAIR}, "layout 'lora' of GGUF cannot hold"),
        ("stock", {"type": "q4_k"}, "rows of 320 weights do not fit q4_k blocks of 256"),
        ("lora", {"representation": "lora", "type": "q1_0", **PAIR}, "do not fit q1_0 blocks of 128"),
        ("lora", {"representation": "lora", "type": "q8_0", **PAIR, "rank": 40}, "rows of 40 weights"),
        ("stock", {"type": "int4"}, "GGUF has no type 'int4'"),
        ("no-such", {}, "no layout 'no-such'"),
    ],
)
def test_decisions_that_cannot_be_written_are_refused(
    layout: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", "llama", intermediate_size=320, num_hidden_layers=1)
    plan = make_plan(model, "gguf", "stock", dense(type="q8_0"))
    rule = decide(**fields)
    tensors = tuple(dataclasses.replace(t, **rule(t.name, t.shape)) if len(t.shape) == 2 else t for t in plan.tensors)
    with pytest.raises(UnsupportedError, match=message):
        converter.predict_files(Checkpoint.open(model), layout, tensors, plan.serving)


def test_missing_importance_is_refused_before_anything_is_written(models: dict[str, Path], tmp_path: Path) -> None:
    plan = make_plan(models["llama"], "gguf", "stock", dense(type="iq2_xxs"))
    bundle = make_bundle(models["llama"], plan, tmp_path / "bundle")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight: iq2_xxs needs importance"):
        converter.convert(bundle, out, lambda _: None)
    assert list(out.iterdir()) == []


def test_interruption_leaves_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    plan = make_plan(models["llama"], "gguf", "stock", dense(type="q8_0"))
    bundle = make_bundle(models["llama"], plan, tmp_path / "bundle")

    def interrupt(progress: Any) -> None:
        if progress.done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "export") as out:
        converter.convert(bundle, out, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_progress_ends_at_the_total(models: dict[str, Path], tmp_path: Path) -> None:
    plan = make_plan(models["llama"], "gguf", "stock", dense(type="q8_0"))
    bundle = make_bundle(models["llama"], plan, tmp_path / "bundle")
    seen: list[Any] = []
    tmp_path.joinpath("out").mkdir()
    converter.convert(bundle, tmp_path / "out", seen.append)
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].done == seen[-1].total == sum(d.nbytes for d in plan.tensors)


def test_structure_check_notices_a_changed_file(models: dict[str, Path], tmp_path: Path) -> None:
    _, out = export(models["llama"], "stock", dense(type="q8_0"), tmp_path)
    file = out / "model.gguf"
    data = file.read_bytes()
    file.write_bytes(data.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    checkpoint = Checkpoint.open(models["llama"])
    plan = make_plan(models["llama"], "gguf", "stock", dense(type="q8_0"))
    identity = converter._Identity(plan.model, "0" * 64, "0" * 64)
    contents = converter._files(checkpoint, "stock", plan.tensors, identity)["model.gguf"]
    metadata, specs = contents.metadata, contents.specs
    with pytest.raises(VerificationError, match="reads back differently"):
        readback.check_structure(file, metadata, specs)
    file.write_bytes(data)
    readback.check_structure(file, metadata, specs)
    for damaged, reason in ((data[:-1], "bytes"), (b"GGUX" + data[4:], "refuses")):
        file.write_bytes(damaged)
        with pytest.raises(VerificationError, match=f"does not read back: .*{reason}"):
            readback.check_structure(file, metadata, specs)


def test_both_readers_read_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    _, out = export(models["llama"], "stock", dense(type="q8_0"), tmp_path)
    library = ggml.load_library()
    assert library is not None
    assert readback._by_ggml(library, out / "model.gguf") == readback._by_gguf_py(out / "model.gguf")
