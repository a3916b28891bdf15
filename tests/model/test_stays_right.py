"""Oddities of models on the Hub, reported as wrong results of other tools, that are right here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from acip_export.artifacts.plan import load_plan
from acip_export.model.chat_template import ChatTemplate
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import Pooling
from acip_export.model.opening import check_checkpoint
from acip_export.model.torch_model import load_causal_lm
from acip_export.text.tokens import TextTokens
from converters.gguf.tokenizer import tokenizer_metadata
from converters.onnx.runtimes.chat import GenaiChatSession, OnnxRuntimeChatSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.encoders import make_encoder
from tests.gguf.tokenizers import Vocabulary
from tests.model.test_config_layouts import planned_and_written
from tests.onnx.test_substitute import make_other
from tests.support import CORPUS, make_model

CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
FILLED = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
ODDITIES: dict[str, dict[str, Any]] = {
    "dropout": {"model": {"dropout": 0.9}},
    "an empty piece": {"model": {"vocab": {"": 513}}},
    "truncation and padding": {
        "truncation": CUT,
        "padding": {**FILLED, "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    },
}


def merged(into: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``into`` with ``changes``, level by level."""
    for key, value in changes.items():
        old = into.get(key)
        into[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return into


@pytest.mark.parametrize("oddity", ODDITIES)
def test_tokenizers_read_text_as_without(oddity: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen2", hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=516)
    wanted = [AutoTokenizer.from_pretrained(model)(text)["input_ids"] for text in CORPUS]
    file = model / "tokenizer.json"
    file.write_text(json.dumps(merged(json.loads(file.read_text()), copy.deepcopy(ODDITIES[oddity]))))
    check_checkpoint(Checkpoint.open(model))
    vocabulary = Vocabulary(tokenizer_metadata(model, {}, 516), tmp_path / "v.gguf")
    assert [vocabulary.tokenize(text) for text in CORPUS] == wanted
    own = TextTokens(model)
    assert [own.encode(text, begin=False) for text in CORPUS] == wanted
    assert [AutoTokenizer.from_pretrained(model)(text)["input_ids"] for text in CORPUS] == wanted


TOKENS = torch.arange(20)[None]


def gpt2_of_the_hub(directory: Path) -> tuple[Path, torch.Tensor]:
    """Names without a prefix, masks among the weights, no head; and the logits of :data:`TOKENS`."""
    model = make_other(directory, "gpt2")
    file = model / "model.safetensors"
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(model)(TOKENS).logits
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file, {"format": "pt"})
    return model, wanted


def test_gpt2_as_it_is_on_the_hub(tmp_path: Path) -> None:
    model, wanted = gpt2_of_the_hub(tmp_path / "gpt2")
    checkpoint = Checkpoint.open(model)
    check_checkpoint(checkpoint)
    assert len(checkpoint.linear_modules) == 8
    with torch.no_grad():
        assert torch.equal(load_causal_lm(checkpoint, torch.float32)(TOKENS).logits, wanted)


@pytest.mark.slow
def test_gpt2_as_it_is_on_the_hub_in_onnxruntime(tmp_path: Path) -> None:
    model, wanted = gpt2_of_the_hub(tmp_path / "gpt2")
    out = planned_and_written(model, "onnx", tmp_path / "out")
    with OnnxRuntimeSession(out, load_plan(out / "plan.json").serving, threads=1) as session:
        (found,) = session.logits(TOKENS.numpy())
    assert wanted.std() > 0.1
    assert np.abs(found - wanted[0].numpy()).max() <= 1e-4


STOPS: dict[str, tuple[dict[str, Any], dict[str, Any], set[int]]] = {
    # config.json, generation_config.json: ends beside the tokenizer's own, 0
    "of the generation": ({"eos_token_id": 7}, {"eos_token_id": [5, 6]}, {5, 6}),
    "one of the generation": ({"eos_token_id": None}, {"eos_token_id": 5}, {5}),
    "of the model": ({"eos_token_id": [7, 8]}, {"do_sample": False}, {7, 8}),
    "of the tokenizer": ({"eos_token_id": None}, {"do_sample": False}, set()),
}


@pytest.mark.parametrize("stops", STOPS)
def test_answers_in_onnx_end_where_the_model_ends_them(stops: str, tmp_path: Path) -> None:
    """Where transformers ends them, and at the tokenizer's end of text, which ends the turns of a conversation."""
    of_model, of_generation, others = STOPS[stops]
    model = make_model(tmp_path / "model", "qwen2", hidden_size=64, intermediate_size=96, head_dim=16)
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **of_model}))
    (model / "generation_config.json").write_text(json.dumps(of_generation))
    reference = AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id
    assert {*([reference] if isinstance(reference, int) else reference or [])} <= others
    out = planned_and_written(model, "onnx", tmp_path / "out")
    serving = load_plan(out / "plan.json").serving
    for session_class in (GenaiChatSession, OnnxRuntimeChatSession):
        with session_class(out, serving, 1) as session:
            assert session.ends == {0, *others}


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_pooling_as_sentence_transformers_6_writes_it(mode: str, tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    steps = json.loads((model / "modules.json").read_text())
    for step in steps:
        name = step["type"].rpartition(".")[2]
        step["type"] = f"sentence_transformers.sentence_transformer.modules.{name.lower()}.{name}"
    (model / "modules.json").write_text(json.dumps(steps))
    (model / "1_Pooling/config.json").write_text(json.dumps({"embedding_dimension": 64, "pooling_mode": mode}))
    found = Checkpoint.open(model).encoder
    assert found is not None and found.pooling == Pooling(mode, True)  # type: ignore[arg-type]


def test_templates_know_the_date() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{{ strftime_now('%Y-%m-%d') }}{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    messages = [{"role": "user", "content": "x"}]

    def wanted() -> str:
        rendered, _ = render_jinja_template([messages], chat_template=template)
        return str(rendered[0])

    before = wanted()
    assert ChatTemplate(template).render(messages) in (before, wanted())  # midnight may pass
