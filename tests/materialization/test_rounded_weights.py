"""The numbers of a plan in memory are those that its export's reference has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acip_export import api as pipeline
from acip_export.artifacts.bundle import load_bundle
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.formats.registry import export_format
from acip_export.materialization.rounded_weights import RoundedWeights
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import FactoredLinear, load_causal_lm
from acip_export.rounding.quantizer import Rounding
from tests.support import dense, everywhere, make_plan

PAIR = {"representation": "factored", "rank": 64, "up_type": "q4_0", "down_type": "q4_0"}
RESIDUAL = {
    "representation": "residual",
    "type": "int4",
    "rank": 32,
    "up_type": "int8",
    "down_type": "int8",
}


def mixed(name: str, shape: tuple[int, ...]) -> dict[str, object]:
    """Pairs among dense layers, of floats and not: channels are scaled around some of them only."""
    if name.endswith("layers.0.mlp.up_proj.weight"):
        return dict(PAIR)
    if name.endswith("k_proj.weight"):
        return {"representation": "dense", "type": "f16"}
    return dense(type="q4_0")(name, shape)


@pytest.mark.parametrize("rounding", ["feedback", "nearest"])
@pytest.mark.parametrize("what", ["dense", "pairs", "mixed"])
def test_they_are_those_of_the_bundle(
    what: str, rounding: Rounding, model: Path, scores: ScoreFile, tmp_path: Path
) -> None:
    rules = {"dense": dense(type="q4_0"), "pairs": everywhere(embedding_type="q8_0", **PAIR), "mixed": mixed}
    layout = "stock" if what == "dense" else "factored"
    same(model, scores, replace(make_plan(model, "gguf", layout, rules[what]), rounding=rounding), tmp_path)


def test_corrected_bases_too(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    def decide(name: str, shape: tuple[int, ...]) -> dict[str, object]:
        """In one layer every kind of matrix has one."""
        rule = everywhere(**RESIDUAL) if ".layers.0." in name else dense(type="int8")
        return rule(name, shape)

    plan = make_plan(model, "onnx", "factored", decide)
    same(model, scores, replace(plan, rounding="feedback"), tmp_path)


def same(model: Path, scores: ScoreFile, plan: Plan, directory: Path) -> None:
    checkpoint = Checkpoint.open(model)
    format = export_format(plan.format)
    pipeline.materialize_bundle(checkpoint, scores, plan, directory / "b")
    reference = load_bundle(directory / "b", format.round_trip)
    weights = RoundedWeights(checkpoint, scores, format.round_trip, format.feedback_types)
    names = list(checkpoint.tensors)
    tensors = weights.of(plan).tensors(names)
    made_by_others = weights.of(plan).tensors(names)
    assert all(made_by_others[name] is tensor for name, tensor in tensors.items())
    dense_model = load_causal_lm(checkpoint, torch.float32)
    missing, unexpected = dense_model.load_state_dict(dict(tensors), strict=False)
    assert not unexpected and len(tensors) > 10 and set(missing).isdisjoint(tensors)
    for name, tensor in tensors.items():
        module = reference.get_submodule(name.rpartition(".")[0])
        if isinstance(module, FactoredLinear):
            expected = module.up.weight @ module.down.weight
            expected = expected if module.weight is None else expected + module.weight
        else:
            expected = reference.get_parameter(name)
        assert torch.allclose(tensor, expected, atol=1e-6), name
    windows = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(
            dense_model(input_ids=windows).logits, reference(input_ids=windows).logits, atol=1e-3, rtol=1e-3
        )
