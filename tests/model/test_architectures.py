"""What is known about architectures beside Llama's, against transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from acip_export.errors import UnsupportedError
from acip_export.model.architectures import TIED_BY_DEFAULT, with_common_keys
from acip_export.model.checkpoint import CONFIG_DEFAULTS, Checkpoint
from acip_export.ranking import rank_model


def test_heads_are_tied_by_default_where_transformers_ties_them() -> None:
    # The assistant of Gemma 4 is a draft model that is made from another configuration only.
    kinds = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"gemma4_assistant"}
    tied = {kind for kind in kinds if getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", False)}
    assert {kind for kind in kinds if kind in TIED_BY_DEFAULT} == tied
    assert all(CONFIG_DEFAULTS[kind]["tie_word_embeddings"] for kind in tied & set(CONFIG_DEFAULTS))


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
