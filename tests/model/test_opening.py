"""Checkpoints that no export can hold: refused before a ranking starts, and by both formats with the same exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from acip_export import ranking
from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.io.atomic import safetensors_header
from acip_export.model.architectures import ARCHITECTURES
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.expected_tensors import expected_tensors
from acip_export.model.opening import check_checkpoint
from acip_export.model.torch_model import expected_parameters, untrained_model
from acip_export.ranking import stage
from tests.encoders import CLASSES, make_encoder
from tests.support import Run, make_model, make_scores, make_tokenizer, unspaced

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 512}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]
Break = Callable[[Path], None]


def config(**changes: Any) -> Break:
    """Write these keys into config.json; ``...`` takes one out."""

    def change(model: Path) -> None:
        file = model / "config.json"
        merged = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))

    return change


def tensors(change: Callable[[Tensors], Tensors]) -> Break:
    def rewrite(model: Path) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in change(load_file(model / WEIGHTS)).items()},
            model / WEIGHTS,
            {"format": "pt"},
        )

    return rewrite


def added(**more: torch.Tensor) -> Break:
    return tensors(lambda found: {**found, **{name.replace("__", "."): value for name, value in more.items()}})


def without(part: str) -> Break:
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if part not in name})


def renamed(change: Callable[[str], str]) -> Break:
    return tensors(lambda found: {change(name): tensor for name, tensor in found.items()})


def content(name: str, data: bytes) -> Break:
    return lambda model: void((model / name).write_bytes(data))


def moved(old: str, new: str) -> Break:
    return lambda model: void((model / old).rename(model / new))


def removed(*names: str) -> Break:
    return lambda model: [(model / name).unlink(missing_ok=True) for name in names] and None


def both(*steps: Break) -> Break:
    return lambda model: [step(model) for step in steps] and None


def void(_: object) -> None:
    return None


def header(change: Callable[[dict[str, Any]], object], more: bytes = b"") -> Break:
    """Change the header of the weights; the data stays."""

    def rewrite(model: Path) -> None:
        data = (model / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        encoded = json.dumps(entries).encode()
        (model / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :] + more)

    return rewrite


def overlap(entries: dict[str, Any]) -> None:
    """Two equal matrices at the same place, and a third as long as both were."""
    one, other = (entries[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    other["data_offsets"] = one["data_offsets"]


def gap(entries: dict[str, Any]) -> None:
    del entries["model.layers.0.input_layernorm.weight"]


def split_in_two(model: Path) -> None:
    found = load_file(model / WEIGHTS)
    names = sorted(found)
    weight_map = {name: f"model-0000{1 + (index % 2)}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: found[name] for name in names if weight_map[name] == shard}, model / shard)
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (model / WEIGHTS).unlink()


def byte_pairs_only(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]
    (model / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (model / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tokenizer["merges"]))
    (model / "tokenizer.json").unlink()


def pooling(model: Path) -> None:
    steps = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    steps.append({"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"})
    (model / "modules.json").write_text(json.dumps(steps))


INDEX = "model.safetensors.index.json"
PART = "model-00002-of-00002.safetensors"
Row = tuple[str, Break, type[Exception], str]
ROWS: dict[str, Row] = {
    # What downloads leave.
    "pointer for the weights": ("llama", content(WEIGHTS, POINTER), CheckpointError, f"{WEIGHTS} is a Git LFS pointer"),
    "page for the weights": ("llama", content(WEIGHTS, PAGE), CheckpointError, f"{WEIGHTS} is a web page"),
    "nothing for the weights": ("llama", content(WEIGHTS, b""), CheckpointError, f"{WEIGHTS} is empty"),
    "text for the weights": ("llama", content(WEIGHTS, b"Entry not found"), CheckpointError, "no safetensors file"),
    "pointer for a shard": (
        "llama",
        both(split_in_two, content(PART, POINTER)),
        CheckpointError,
        f"{PART} is a Git LFS",
    ),
    "pointer for the index": ("llama", both(split_in_two, content(INDEX, POINTER)), CheckpointError, "is a Git LFS"),
    **{
        f"{what} for {name}": ("llama", content(name, data), CheckpointError, f"{name} {words}")
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
        for what, data, words in (
            ("pointer", POINTER, "is a Git LFS pointer"),
            ("page", PAGE, "is a web page"),
            ("nothing", b"", "is empty"),
            ("half", b'{"model": {', "cannot be read as JSON"),
            ("a list", b"[]", "holds a list"),
        )
    },
    "byte order mark": (
        "llama",
        content("tokenizer_config.json", b"\xef\xbb\xbf{}"),
        CheckpointError,
        "tokenizer_config.json cannot be read as JSON",
    ),
    "template in Latin-1": (
        "llama",
        content("chat_template.jinja", "Grüße".encode("latin-1")),
        CheckpointError,
        "chat_template.jinja is no UTF-8 text",
    ),
    "tokenizer.json of something else": ("llama", content("tokenizer.json", b"{}"), CheckpointError, "no tokenizer"),
    "vocab.json and merges.txt": (
        "llama",
        byte_pairs_only,
        CheckpointError,
        "has vocab.json and merges.txt, but no tokenizer.json",
    ),
    "no tokenizer": (
        "llama",
        removed("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        CheckpointError,
        "has no tokenizer.json",
    ),
    # Weights under other names.
    "another name": ("llama", moved(WEIGHTS, "pytorch.safetensors"), CheckpointError, f"Rename it to {WEIGHTS}"),
    "parts without an index": ("llama", both(split_in_two, removed(INDEX)), CheckpointError, f"Fetch {INDEX}"),
    "one part without an index": ("llama", both(split_in_two, removed(INDEX, PART)), CheckpointError, f"Fetch {INDEX}"),
    "a part missing": ("llama", both(split_in_two, removed(PART)), CheckpointError, f"{PART} does not exist"),
    "an index of nothing": ("llama", both(split_in_two, content(INDEX, b"{}")), CheckpointError, "weight_map"),
    "an index of numbers": (
        "llama",
        both(split_in_two, content(INDEX, b'{"weight_map":{"a":1}}')),
        CheckpointError,
        "weight_map",
    ),
    "no weights": ("llama", removed(WEIGHTS), CheckpointError, "has no *.safetensors"),
    # Damaged weights.
    "overlapping tensors": ("llama", header(overlap), CheckpointError, "overlaps what is before it"),
    "a gap": ("llama", header(gap), CheckpointError, "leaves a gap to what is before it"),
    "bytes at the end": ("llama", header(lambda _: None, b"more"), CheckpointError, "fetch or save the file again"),
    # Quantized weights.
    **{
        f"quantized by {method}": (
            "llama",
            config(quantization_config={"quant_method": method, "bits": 4}),
            UnsupportedError,
            f"quantized (quantization_config in config.json: {method}); export the original",
        )
        for method in ("auto-round", "gptq", "compressed-tensors", "fp8")
    },
    "packed, config.json does not say so": (
        "llama",
        both(
            without("layers.0.mlp.up_proj"),
            added(model__layers__0__mlp__up_proj__qweight=torch.zeros(8, 96, dtype=torch.int32)),
        ),
        UnsupportedError,
        "up_proj.qweight is stored as I32",
    ),
    "bytes": (
        "llama",
        added(model__layers__0__mlp__up_proj__weight=torch.zeros(96, 64, dtype=torch.int8)),
        UnsupportedError,
        "up_proj.weight is stored as I8",
    ),
    "float8": (
        "llama",
        added(model__layers__0__mlp__up_proj__weight=torch.zeros(96, 64).to(torch.float8_e4m3fn)),
        UnsupportedError,
        "up_proj.weight is stored as F8_E4M3",
    ),
    "a scale in eight bits": (
        "llama",
        header(lambda entries: entries["model.norm.weight"].update(dtype="F4", shape=[512])),
        UnsupportedError,
        "model.norm.weight is stored as F4",
    ),
    # Biases.
    "biases switched off": (
        "biased",
        config(attention_bias=False),
        CheckpointError,
        "self_attn.q_proj.bias  64 too many: config.json has attention_bias false  (in 2 layers)",
    ),
    "mlp biases switched off": ("biased", config(mlp_bias=False), CheckpointError, "config.json has mlp_bias false"),
    "biases missing": (
        "llama",
        config(attention_bias=True),
        CheckpointError,
        "self_attn.o_proj.bias  missing, expected 64: config.json has attention_bias true",
    ),
    "one bias missing": (
        "qwen2",
        without("layers.1.self_attn.k_proj.bias"),
        CheckpointError,
        "model.layers.*.self_attn.k_proj.bias  missing, expected 32\n",
    ),
    "a bias too many": (
        "qwen2",
        added(model__layers__0__self_attn__o_proj__bias=torch.zeros(64)),
        CheckpointError,
        "self_attn.o_proj.bias  64 too many",
    ),
    # What config.json promises.
    **{
        f"{key} {value}": ("llama", config(**{key: value}), CheckpointError, words)
        for key, value, words in (
            ("hidden_size", 128, "model.embed_tokens.weight                        512×64, expected 512×128"),
            ("intermediate_size", 64, "mlp.down_proj.weight                  64×96, expected 64×64  (in 2 layers)"),
            ("num_attention_heads", 8, "self_attn.q_proj.weight"),
            ("num_attention_heads", 3, "num_attention_heads 3 is no multiple of num_key_value_heads 2"),
            ("num_key_value_heads", 1, "self_attn.v_proj.weight"),
            ("head_dim", 8, "head_dim 8"),
            ("vocab_size", 600, "model.embed_tokens.weight  512×64, expected 600×64"),
            ("num_hidden_layers", 3, "num_hidden_layers 3, the weights have 2 layers"),
            ("num_hidden_layers", 1, "num_hidden_layers 1, the weights have 2 layers"),
            ("num_hidden_layers", 10**9, "num_hidden_layers 1000000000, the weights have 2 layers"),
            ("hidden_size", 2**30, "expected 512×1073741824"),
            ("tie_word_embeddings", False, "lm_head.weight  missing, expected 512×64"),
            # Types and ranges.
            ("num_hidden_layers", "2", 'config.json: num_hidden_layers is "2", expected a whole number'),
            ("hidden_size", 64.0, "config.json: hidden_size is 64.0, expected a whole number"),
            ("vocab_size", True, "config.json: vocab_size is true, expected a whole number"),
            ("num_attention_heads", [4, 4], "config.json: num_attention_heads is [4, 4], expected a whole number"),
            ("intermediate_size", -96, "config.json: intermediate_size is -96"),
            ("num_key_value_heads", 0, "config.json: num_key_value_heads is 0"),
            ("max_position_embeddings", 10**12, "config.json: max_position_embeddings is 1000000000000, expected"),
            ("head_dim", 10**400, "config.json: head_dim is 1000"),
            ("rms_norm_eps", "1e-6", "config.json: rms_norm_eps is"),
            ("rms_norm_eps", -1e-6, "config.json: rms_norm_eps is -1e-06, expected a finite number that is not neg"),
            ("rms_norm_eps", float("nan"), "config.json: rms_norm_eps is NaN"),
            ("rope_theta", 0, "config.json: rope_theta is 0"),
            ("rope_scaling", [], "config.json: rope_scaling is [], expected an object"),
            ("rope_scaling", {"rope_type": "linear", "factor": "2"}, 'config.json: rope_scaling.factor is "2"'),
            (
                "rope_parameters",
                {"rope_type": "linear", "rope_theta": None, "factor": -1},
                "rope_parameters.factor is -1",
            ),
            ("architectures", "LlamaForCausalLM", 'config.json: architectures is "LlamaForCausalLM", expected a list'),
            ("model_type", 3, "config.json: model_type is 3"),
            ("model_type", None, "config.json has no model_type"),
            ("tie_word_embeddings", "yes", 'config.json: tie_word_embeddings is "yes", expected true or false'),
            ("text_config", "none", 'config.json: text_config is "none", expected an object'),
            ("text_config", {"hidden_size": "64"}, 'config.json: text_config.hidden_size is "64"'),
            ("layer_types", ["full_attention"], "config.json: layer_types lists 1 layers, num_hidden_layers is 2"),
            ("quantization_config", "none", "config.json: quantization_config is"),
            ("eos_token_id", 99999, "config.json: eos_token_id names token 99999, but the model has 512 embeddings"),
            ("pad_token_id", -1, "config.json: pad_token_id is -1, expected a token's number"),
            ("bos_token_id", "<s>", 'config.json: bos_token_id is "<s>"'),
        )
    },
    "a head norm of another width": (
        "qwen3",
        added(model__layers__1__self_attn__q_norm__weight=torch.ones(8)),
        CheckpointError,
        "model.layers.*.self_attn.q_norm.weight  8, expected 16\n",
    ),
    "a layer incomplete": ("llama", without("layers.1.mlp.up_proj"), CheckpointError, "up_proj.weight  missing"),
    "a tensor of something else": ("llama", added(visual__weight=torch.ones(3, 3)), CheckpointError, "3×3 too many"),
    "generation ends at no token": (
        "llama",
        content("generation_config.json", b'{"eos_token_id": [1, 99999]}'),
        CheckpointError,
        "generation_config.json: eos_token_id names token 99999",
    ),
    "generation settings of another type": (
        "llama",
        content("generation_config.json", b'{"top_k": "fifty"}'),
        CheckpointError,
        'generation_config.json: top_k is "fifty"',
    ),
    "part of a scaled head rotated": (
        "llama",
        config(rope_parameters=..., rope_scaling={"type": "linear", "factor": 2.0}, partial_rotary_factor=0.5),
        CheckpointError,
        "transformers cannot compute that for a llama",
    ),
    # Other kinds of models.
    "attention in both directions": (
        "gemma3_text",
        config(use_bidirectional_attention=True),
        UnsupportedError,
        "use_bidirectional_attention is true",
    ),
    "not causal": ("qwen2", config(is_causal=False), UnsupportedError, "is_causal is false"),
    "an encoder that looks back": ("bert", config(is_decoder=True), UnsupportedError, "is_decoder"),
    "an encoder of other sizes": ("bert", config(intermediate_size=64), CheckpointError, "intermediate.dense.weight"),
    "a decoder saved without its head": (
        "qwen3",
        renamed(lambda name: name.removeprefix("model.")),
        UnsupportedError,
        "is a decoder that makes embeddings (no tensor's name starts with  model.)",
    ),
    "a decoder whose tokens are pooled": ("qwen3", pooling, UnsupportedError, "modules.json pools its tokens"),
    "compiled when it was saved": (
        "llama",
        renamed(lambda name: f"_orig_mod.{name}"),
        CheckpointError,
        "starts with '_orig_mod.', which a wrapper around the model added",
    ),
}


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole models with scores, by the names of the table."""
    parent = tmp_path_factory.mktemp("good")
    sharded = make_model(parent / "llama", **SIZES)
    models = {
        "llama": sharded,
        "biased": make_model(parent / "biased", attention_bias=True, mlp_bias=True, **SIZES),
        "qwen2": make_model(parent / "qwen2", "qwen2", **SIZES),
        "qwen3": make_model(parent / "qwen3", "qwen3", **SIZES),
        "gemma3_text": make_model(parent / "gemma3", "gemma3_text", **SIZES),
        "bert": make_encoder(parent / "bert"),
    }
    for model in models.values():
        make_scores(model)
    return models


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, again and again.\n" * 400)
    return file


def code_of(error: type[Exception]) -> int:
    return {CheckpointError: 3, UnsupportedError: 5}[error]


@pytest.mark.parametrize("row", ROWS)
def test_refused_before_ranking_and_by_both_formats(
    row: str, good: dict[str, Path], text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the ranking has started")

    monkeypatch.setattr(stage, "read_data", started)
    base, damage, error, words = ROWS[row]
    model = tmp_path / "model"
    shutil.copytree(good[base], model)
    damage(model)
    before = sorted(model.iterdir())

    ranked = run("rank", model, "--data", text, "--algorithm", "magnitude", "-o", tmp_path / "x.acip")
    assert unspaced(words) in unspaced(ranked.err)
    assert ranked.code == code_of(error)
    assert "Traceback" not in ranked.err

    scores = next(good[base].glob("*.acip"))
    for name in ("gguf", "onnx"):
        out = tmp_path / name
        made = run("--model", model, "--scores", scores, "--budget", "1GB", "--format", name, "-o", out)
        assert (made.code, unspaced(words) in unspaced(made.err)) == (ranked.code, True), made.err
        assert not out.exists()
    assert sorted(model.iterdir()) == before


@pytest.mark.parametrize("name", ["llama", "biased", "qwen2", "qwen3", "gemma3_text", "bert"])
def test_whole_models_pass(name: str, good: dict[str, Path], tmp_path: Path) -> None:
    check_checkpoint(Checkpoint.open(good[name]))
    if name == "llama":
        shutil.copytree(good[name], tmp_path / "parts")
        split_in_two(tmp_path / "parts")
        check_checkpoint(Checkpoint.open(tmp_path / "parts"))


def test_other_files_beside_the_weights_are_left_alone(good: dict[str, Path], tmp_path: Path) -> None:
    """Mistral's own format lies beside transformers' on the Hub."""
    model = tmp_path / "model"
    shutil.copytree(good["llama"], model)
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, model / "consolidated.safetensors")
    check_checkpoint(Checkpoint.open(model))
    assert set(Checkpoint.open(model).tensors) == set(safetensors_header(model / WEIGHTS, CheckpointError))


BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False}, BIASES], ids=str)
@pytest.mark.parametrize("kind", [kind for kind, row in ARCHITECTURES.items() if row.layer])
def test_the_tensors_of_a_decoder_are_those_of_transformers(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {"vocab_size": 11, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    written = AutoConfig.for_model(kind, **sizes, **heads, **settings).to_dict()
    checkpoint = Checkpoint(tmp_path, json.loads(json.dumps(written)), {})
    assert expected_tensors(checkpoint.config, checkpoint.shape, 2) == expected_parameters(checkpoint.config)[0]


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tensors_of_an_encoder_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_encoder(tmp_path / "model", kind, num_labels=5))
    expected = {name: tuple(p.shape) for name, p in untrained_model(checkpoint.config).named_parameters()}
    expected.pop("cls.predictions.decoder.bias", None)
    assert expected_tensors(checkpoint.config, checkpoint.shape, 2) == expected


UNKNOWN: dict[str, tuple[Break, str]] = {
    "hidden size": (config(n_embd=128), "transformer.wte.weight"),
    "tensor missing": (without("h.1.mlp.c_fc.weight"), "transformer.h.*.mlp.c_fc.weight  missing, expected 96×64"),
    "tensor too many": (added(transformer__visual=torch.ones(3)), "transformer.visual"),
    "layers": (config(n_layer=10**9), "num_hidden_layers 1000000000"),
    "string": (config(n_head="4"), 'config.json: n_head is "4"'),
}


@pytest.mark.parametrize("row", UNKNOWN)
def test_models_without_a_row_are_compared_with_transformers(row: str, text: Path, tmp_path: Path) -> None:
    damage, words = UNKNOWN[row]
    model = make_model(
        tmp_path / "model",
        "gpt2",
        tokenizer=make_tokenizer("qwen2"),
        n_embd=64,
        n_inner=96,
        n_layer=2,
        n_head=4,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    check_checkpoint(Checkpoint.open(model))
    damage(model)
    with pytest.raises(CheckpointError) as refused:
        ranking.rank_model(model, text, algorithm="magnitude")
    assert unspaced(words) in unspaced(str(refused.value))


def test_what_transformers_refuses_is_said_in_its_words(good: dict[str, Path], text: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(good["llama"], model)
    config(attention_dropout="none")(model)
    with pytest.raises(CheckpointError, match=r"config\.json: transformers refuses it: .*attention_dropout"):
        ranking.rank_model(model, text, algorithm="magnitude")


def test_a_format_that_cannot_hold_the_model_is_named_before_the_ranking(
    text: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(tmp_path / "model", "olmo2", **SIZES)
    made = run("rank", model, "--data", text, "--algorithm", "magnitude", "--context", "32", "--no-measure-rounding")
    assert made.code == 0, made.err
    (warning,) = (record.getMessage() for record in caplog.records if "has no export as" in record.getMessage())
    assert "has no export as gguf: llama.cpp's 'olmo2' needs a head of its own" in warning
