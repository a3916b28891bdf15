"""What is known about architectures beside Llama's, against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from acip_export.errors import UnsupportedError
from acip_export.model.architectures import ARCHITECTURES, architecture_of
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.rope import rope_fields
from acip_export.model.shape import model_shape, with_common_keys
from acip_export.ranking import rank_model
from converters.gguf.architectures import FAMILIES as GGUF_FAMILIES
from converters.onnx.genai_builder.families import FAMILIES as ONNX_FAMILIES

DECODERS = [kind for kind, row in ARCHITECTURES.items() if row.layer]
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
KINDS_OF_LAYERS = ["sliding_attention", "full_attention", *["sliding_attention"] * 5]
# What config.json may say about windows.
WINDOWS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "window": {"sliding_window": 16},
    "no window": {"sliding_window": None},
    "switched on": {"sliding_window": 16, "use_sliding_window": True},
    "switched off": {"sliding_window": 16, "use_sliding_window": False},
    "upper layers": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
    "every third": {"sliding_window": 16, "use_sliding_window": True, "sliding_window_pattern": 3},
    "positions": {"sliding_window": 16, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1, 0, 1, 1]},
    "interval of positions": {"sliding_window": 16, "use_sliding_window": True, "no_rope_layer_interval": 3},
    "listed": {"sliding_window": 16, "use_sliding_window": True, "layer_types": KINDS_OF_LAYERS},
}


def test_heads_are_tied_by_default_where_transformers_ties_them() -> None:
    # The assistant of Gemma 4 is a draft model that is made from another configuration only.
    kinds = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"gemma4_assistant"}
    tied = {kind for kind in kinds if getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", False)}
    assert {kind for kind in kinds if architecture_of({"model_type": kind}).tied} == tied


def test_every_row_is_of_a_model_type_and_classes_that_transformers_has() -> None:
    # Made by a class of their own that is no model type, or known to the configuration of another.
    assert set(ARCHITECTURES) <= set(CONFIG_MAPPING)
    for kind, row in ARCHITECTURES.items():
        for name in row.classes:
            assert issubclass(getattr(transformers, name), transformers.PreTrainedModel)
            assert getattr(transformers, name).config_class.model_type == kind
        assert set(row.encoders) <= set(row.classes)


def test_rows_of_the_converters_are_of_known_architectures() -> None:
    exported = {kind for kind, row in ARCHITECTURES.items() if row.classes}
    assert {kind for family in GGUF_FAMILIES for kind in family.model_types} <= exported
    assert set(ONNX_FAMILIES) <= set(DECODERS)
    assert all(ARCHITECTURES[kind].fused_attention for kind in ONNX_FAMILIES)


@pytest.mark.parametrize("kind", DECODERS)
def test_what_a_configuration_leaves_out_is_what_transformers_assumes(kind: str) -> None:
    config = CONFIG_MAPPING[kind](**SIZES)
    shape = model_shape({**SIZES, "model_type": kind})
    heads = SIZES["num_attention_heads"]
    width = getattr(config, "head_dim", None) or SIZES["hidden_size"] // heads
    assert (shape.kv_heads, shape.head_dim) == (config.num_key_value_heads, width)
    assert (shape.max_context, shape.tied_embeddings) == (config.max_position_embeddings, config.tie_word_embeddings)
    row = ARCHITECTURES[kind]
    assert all(getattr(CONFIG_MAPPING[kind], key) == value for key, value in row.defaults.items())
    assert row.layer is not None
    assert all(getattr(CONFIG_MAPPING[kind], key) is False for key in row.layer.bias_keys)


@pytest.mark.parametrize("says", WINDOWS)
@pytest.mark.parametrize("kind", DECODERS)
def test_layers_have_the_windows_that_transformers_gives_them(kind: str, says: str) -> None:
    configuration = CONFIG_MAPPING[kind]
    config = configuration(**SIZES, **WINDOWS[says])
    # Keys that the architecture does not have are kept, and nothing reads them.
    window = config.sliding_window if hasattr(configuration, "sliding_window") else None
    kinds = ["sliding_attention"] * SIZES["num_hidden_layers"]
    if hasattr(configuration, "layer_types"):
        kinds = config.layer_types
    expected = tuple(kind == "sliding_attention" for kind in kinds) if window is not None else ()
    shape = model_shape({**SIZES, "model_type": kind, **WINDOWS[says]})
    assert shape.sliding_layers == (expected if any(expected) else ())
    assert shape.sliding_window == (window if any(expected) else None)


@pytest.mark.parametrize("kind", DECODERS)
def test_positions_have_the_base_that_transformers_assumes(kind: str) -> None:
    assumed = CONFIG_MAPPING[kind](**SIZES).rope_parameters
    for layer in ("full_attention", "sliding_attention"):
        expected = assumed.get(layer, assumed)
        fields = rope_fields({"model_type": kind}, layer)
        assert (fields["rope_theta"], fields["rope_type"]) == (expected["rope_theta"], expected["rope_type"])
    assert ("sliding_attention" in assumed) == (ARCHITECTURES[kind].rotary.local_theta is not None)


@pytest.mark.parametrize("kind", ["bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "opt"])
def test_sizes_are_found_under_every_name(kind: str) -> None:
    config = CONFIG_MAPPING[kind]()
    found = with_common_keys(config.to_dict())
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert found[key] == getattr(config, key)
    assert found["intermediate_size"] > 0


def test_a_mixture_of_experts_is_refused_before_it_is_ranked(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "qwen2_moe", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, num_experts=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    (tmp_path / "t.txt").write_text("text " * 100)
    with pytest.raises(UnsupportedError, match=r"mixture of 4 experts \(num_experts") as raised:
        rank_model(tmp_path / "m", tmp_path / "t.txt", out=tmp_path / "s.acip")
    assert raised.value.exit_code == 5
    with pytest.raises(UnsupportedError, match="mixture of 4 experts"):
        _ = Checkpoint.open(tmp_path / "m").shape


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_null_is_missing(key: str) -> None:
    for config in ({**SIZES, key: None}, {name: size for name, size in SIZES.items() if name != key}):
        with pytest.raises(UnsupportedError, match=f"config.json has no '{key}'; only transformer configurations"):
            model_shape({"model_type": "llama", **config})
