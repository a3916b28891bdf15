"""What readers hand out can be read by anybody and changed by nobody."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acip_export.artifacts.bundle import Bundle
from acip_export.errors import InputError
from acip_export.io.atomic import read_json_object
from acip_export.io.frozen import frozen, thawed
from acip_export.model.checkpoint import Checkpoint
from tests.support import dense, make_bundle, make_model, make_plan

SCALING = {"rope_type": "linear", "factor": 2.0}


def parts(value: Any) -> list[Any]:
    """A value and everything in it."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [value, *(part for item in inner for part in parts(item))]


def is_read_only(value: Any) -> bool:
    return not any(isinstance(part, (dict, list)) for part in parts(value))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_frozen_and_thawed_are_the_same_json(value: Any) -> None:
    held = frozen(value)
    assert is_read_only(held)
    assert thawed(held) == value
    assert json.dumps(thawed(held)) == json.dumps(value)


def test_thawed_shares_nothing() -> None:
    held = frozen({"a": {"b": [1]}})
    thawed(held)["a"]["b"].append(2)
    assert thawed(held) == {"a": {"b": [1]}}


def test_readers_hand_out_what_nobody_can_change(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", hidden_size=64, rope_scaling=SCALING)
    bundle = make_bundle(model, make_plan(model, "onnx", "factored", dense(type="f32")), tmp_path / "bundle")
    opened = Checkpoint.open(model)
    for config in (
        opened.config,
        opened.with_options({}).config,
        Bundle.open(bundle.path).config,
        bundle.as_checkpoint().config,
        read_json_object(model / "tokenizer_config.json", InputError),
    ):
        assert config
        assert is_read_only(config)
    with pytest.raises(TypeError):
        opened.config["rope_parameters"]["factor"] = 4.0
