"""Names, permutations and refusals of the architecture table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import transformers_config
from converters.gguf.architectures import family_of
from converters.gguf.writer import uint32
from tests.gguf.conftest import ARCHITECTURES
from tests.support import make_model, rope


def with_config(model: Path, **changes: Any) -> Checkpoint:
    checkpoint = Checkpoint.open(model)
    return Checkpoint(model, {**checkpoint.config, **changes}, dict(checkpoint.tensors))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tensor_gets_its_own_name(arch: str, models: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(models[arch])
    names = family_of(checkpoint.shape.architecture).tensor_names(checkpoint.tensors, checkpoint.shape)
    assert set(names) == set(checkpoint.tensors)
    assert len(set(names.values())) == len(names)
    assert names["model.layers.1.mlp.down_proj.weight"] == "blk.1.ffn_down.weight"


def test_unmapped_and_missing_tensors_are_both_listed(models: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(models["llama"])
    names = [name for name in checkpoint.tensors if "layers.1.mlp.up_proj" not in name] + ["model.extra.weight"]
    with pytest.raises(
        UnsupportedError, match=r"no place for model\.extra\.weight; nothing for blk\.1\.ffn_up\.weight"
    ):
        family_of("LlamaForCausalLM").tensor_names(names, checkpoint.shape)


def test_bias_of_another_family_is_refused(models: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(models["qwen3"])
    names = [*checkpoint.tensors, "model.layers.0.self_attn.q_proj.bias"]
    with pytest.raises(UnsupportedError, match=r"no place for model\.layers\.0\.self_attn\.q_proj\.bias"):
        family_of("Qwen3ForCausalLM").tensor_names(names, checkpoint.shape)


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM, MistralForCausalLM, Olmo2ForCausalLM"):
        family_of("MambaForCausalLM")


CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}


QWEN2 = {"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True}


def shaped(architecture: str, model_type: str = "", **settings: Any) -> Checkpoint:
    return Checkpoint(Path(), {**CONFIG, "architectures": [architecture], "model_type": model_type, **settings}, {})


YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {"original_max_position_embeddings": 64, "short_factor": [1.0] * 16, "long_factor": [1.0] * 15}


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "'llama' computes silu, config.json asks for 'gelu'"),
        ("LlamaForCausalLM", {"rms_norm_eps": None}, "no rms_norm_eps"),
        (
            "LlamaForCausalLM",
            rope("linear", factor=2.0, partial_rotary_factor=0.5),
            "rotates all 32 dimensions of a head",
        ),
        ("LlamaForCausalLM", rope("dynamic", factor=2.0), "no rotary embedding 'dynamic' .* default, linear, llama3"),
        ("LlamaForCausalLM", rope("yarn", **YARN, beta_fast=16), "beta_fast 32.0, config.json has 16"),
        ("LlamaForCausalLM", rope("yarn", **YARN, truncate=False), "truncates its correction range"),
        ("LlamaForCausalLM", rope("yarn", original_max_position_embeddings=1024), "'yarn' has no 'factor'"),
        ("LlamaForCausalLM", rope("linear"), "'linear' has no 'factor'"),
        ("LlamaForCausalLM", rope("longrope", **LONG), "15 values in long_factor, 16 are needed"),
        ("Qwen2ForCausalLM", {"head_dim": 16}, "has 4 of 16"),
        ("Qwen2ForCausalLM", rope("llama3"), "no rotary embedding 'llama3'"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, "always caps attention and logits"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "looks back only"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 1, 0, 1]}, r"every 4th layer .* rotates \[1, 1, 0, 1\]"),
    ],
)
def test_configs_that_llama_cpp_would_compute_differently(
    architecture: str, settings: dict[str, Any], message: str
) -> None:
    checkpoint, family = shaped(architecture, **settings), family_of(architecture)
    with pytest.raises(UnsupportedError, match=message):
        family.hyperparameters(checkpoint.config, checkpoint.shape)
        family.constants(checkpoint.config, checkpoint.shape)


@pytest.mark.parametrize(
    ("architecture", "settings", "context"),
    [
        ("MistralForCausalLM", {"model_type": "mistral", "sliding_window": 1024}, 1024),
        ("MistralForCausalLM", {"model_type": "mistral", "sliding_window": None}, 4096),
        ("MistralForCausalLM", {"model_type": "mistral", "max_position_embeddings": 32768}, 4096),
        ("Phi3ForCausalLM", {"model_type": "phi3", "sliding_window": 2047}, 2047),
        ("Qwen2ForCausalLM", {"model_type": "qwen2", "sliding_window": 1024}, 4096),
        ("Qwen2ForCausalLM", {**QWEN2, "max_window_layers": 3}, 1024),
        # Above layer 28, unless the configuration says otherwise.
        ("Qwen2ForCausalLM", QWEN2, 4096),
        ("Gemma3ForCausalLM", {"model_type": "gemma3_text", "sliding_window": 1024}, 4096),
    ],
)
def test_context_ends_where_llama_cpp_would_attend_further(
    architecture: str, settings: dict[str, Any], context: int
) -> None:
    checkpoint = shaped(architecture, **settings)
    family = family_of(architecture)
    keys = family.hyperparameters(checkpoint.config, checkpoint.shape)
    assert keys[f"{family.name}.context_length"] == uint32(context)


def test_a_tied_head_that_llama_cpp_wants_for_itself(tmp_path: Path) -> None:
    model = make_model(tmp_path, "olmo2", num_hidden_layers=1, tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match="'olmo2' needs a head of its own"):
        family_of("Olmo2ForCausalLM").tensor_names(Checkpoint.open(model).tensors, Checkpoint.open(model).shape)


def test_old_and_new_rope_fields_mean_the_same(models: dict[str, Path]) -> None:
    family = family_of("LlamaForCausalLM")
    new = with_config(models["llama"], rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    old_config = {k: v for k, v in new.config.items() if k != "rope_parameters"}
    old_config |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert family.hyperparameters(new.config, new.shape) == family.hyperparameters(old_config, new.shape)


def test_llama3_frequency_factors_are_those_of_transformers(models: dict[str, Path]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    checkpoint = with_config(models["llama"], rope_parameters=scaling)
    config = transformers_config(checkpoint.config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = family_of("LlamaForCausalLM").constants(checkpoint.config, checkpoint.shape)["rope_freqs.weight"]
    # float32 arithmetic on both sides.
    np.testing.assert_allclose(factors, plain / scaled.numpy(), rtol=1e-5)
    assert factors[0] == 1
    assert factors[-1] == 8
