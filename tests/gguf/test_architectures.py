"""Names, permutations and refusals of the architecture table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acip_export.checkpoint import Checkpoint
from acip_export.errors import UnsupportedError
from converters.gguf.architectures import family_of
from tests.gguf.conftest import ARCHITECTURES


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
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"):
        family_of("MambaForCausalLM")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "SiLU"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn' is not supported"),
    ],
)
def test_configs_that_llama_cpp_would_compute_differently(
    models: dict[str, Path], changes: dict[str, Any], message: str
) -> None:
    checkpoint = with_config(models["llama"], **changes)
    with pytest.raises(UnsupportedError, match=message):
        family_of("LlamaForCausalLM").hyperparameters(checkpoint.config, checkpoint.shape)


def test_qwen2_heads_as_wide_as_the_hidden_size(models: dict[str, Path]) -> None:
    checkpoint = with_config(models["qwen2"], head_dim=32)
    with pytest.raises(UnsupportedError, match="has 4 of 32"):
        family_of("Qwen2ForCausalLM").hyperparameters(checkpoint.config, checkpoint.shape)


def test_old_and_new_rope_fields_mean_the_same(models: dict[str, Path]) -> None:
    family = family_of("LlamaForCausalLM")
    new = with_config(models["llama"], rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    old_config = {k: v for k, v in new.config.items() if k != "rope_parameters"}
    old_config |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert family.hyperparameters(new.config, new.shape) == family.hyperparameters(old_config, new.shape)


def test_llama3_frequency_factors_are_those_of_transformers(models: dict[str, Path]) -> None:
    from transformers import AutoConfig
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
    fields = json.loads(json.dumps(checkpoint.config))
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = family_of("LlamaForCausalLM").constants(checkpoint.config, checkpoint.shape)["rope_freqs.weight"]
    # float32 arithmetic on both sides.
    np.testing.assert_allclose(factors, plain / scaled.numpy(), rtol=1e-5)
    assert factors[0] == 1
    assert factors[-1] == 8
