"""Tiny models, and exports made of them once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import Serving
from acip_export.model.checkpoint import Checkpoint
from converters.onnx import converter
from tests.support import dense, everywhere, make_bundle, make_model, make_plan, make_scores

CONTEXT, PROMPT_BATCH = 48, 16


@pytest.fixture(autouse=True, scope="session")
def own_graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No marked graph is kept from earlier runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# Small, with a head size that is not hidden / heads, and rows that are no multiple of the larger blocks.
SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "num_attention_heads": 4}
# Exact products: differences from the reference are rounding only.
EXACT = converter.Options(accuracy_level=0)


def mixed(name: str, _shape: tuple[int, ...]) -> dict[str, Any]:
    """Factor pairs of two formats beside dense matrices of three, as plans mix them."""
    if "embed" in name or "lm_head" in name:
        return {"representation": "dense", "type": "int8"}
    if "mlp" in name:
        return {"representation": "factored", "rank": 32, "up_type": "int8", "down_type": "int4-b64"}
    if "o_proj" in name:
        return {"representation": "dense", "type": "int4-b128"}
    return {"representation": "dense", "type": "f32" if "k_proj" in name else "int8-b128"}


def asymmetric(name: str, _shape: tuple[int, ...]) -> dict[str, Any]:
    """Zero points in every kind of node, in blocks smaller and larger than the usual ones."""
    if "embed" in name or "lm_head" in name:
        return {"representation": "dense", "type": "uint4-b64"}
    if "mlp" in name:
        return {"representation": "factored", "rank": 32, "up_type": "uint8-b16", "down_type": "uint4-b16"}
    if "o_proj" in name:
        return {"representation": "dense", "type": "int4-b256"}
    return {"representation": "dense", "type": "uint2-b64" if "k_proj" in name else "uint8-b256"}


Rule = Callable[[str, tuple[int, ...]], dict[str, Any]]
RULES: dict[str, Rule] = {
    "dense f32": dense(type="f32"),
    "factored f32": everywhere(
        representation="factored", rank=32, up_type="f32", down_type="f32", embedding_type="f32"
    ),
    "int8": dense(type="int8"),
    "int4": dense(type="int4"),
    "int2": dense(type="int2", embedding_type="int4"),
    "int4, float embedding": dense(type="int4", embedding_type="f32"),
    "mixed": mixed,
    "asymmetric": asymmetric,
}


@dataclass(frozen=True)
class Export:
    """A directory with what it was made of."""

    path: Path
    model: Path
    bundle: Bundle

    @property
    def written(self) -> dict[str, int]:
        files = (file for file in self.path.rglob("*") if file.is_file())
        return {str(file.relative_to(self.path)): file.stat().st_size for file in files}

    def predicted(self) -> dict[str, int]:
        plan = self.bundle.plan
        return converter.predict_files(Checkpoint.open(self.model), plan.layout, plan.tensors, plan.serving)


def half_export(directory: Path, arch: str, settings: dict[str, Any], rule: Rule, backend: str) -> Export:
    """Model, bundle and export below ``directory``, of float16 graphs: vectors and KV cache are in it, too."""
    model = make_model(directory / "m", arch, **{**SIZES, **settings})
    drafted = make_plan(model, "onnx", "factored", rule, CONTEXT, PROMPT_BATCH)
    tensors = (replace(d, type="f16", nbytes=d.nbytes // 2) if len(d.shape) == 1 else d for d in drafted.tensors)
    plan = replace(drafted, tensors=tuple(tensors), serving=Serving(CONTEXT, "f16", PROMPT_BATCH, backend))
    bundle = make_bundle(model, plan, directory / "b")
    (directory / "e").mkdir()
    converter.convert(bundle, directory / "e", lambda _: None, EXACT)
    return Export(directory / "e", model, bundle)


class MakeExport(Protocol):
    """``make_export(architecture, tied, rule, **sizes)``; the same export again when asked again.

    An architecture of the form ``samples/NAME`` is that trained model, whose sizes and tying are its own.
    """

    def __call__(self, arch: str, tied: bool, rule: str, **sizes: Any) -> Export: ...


@pytest.fixture(scope="session")
def make_export(tmp_path_factory: pytest.TempPathFactory) -> MakeExport:
    root = tmp_path_factory.mktemp("onnx")
    made: dict[str, Export] = {}

    def make(arch: str, tied: bool, rule: str, **sizes: Any) -> Export:
        kind = "-".join([arch, str(tied), *(str(value) for value in sizes.values())])
        key = f"{kind}-{rule.replace(' ', '-')}"
        if key not in made:
            model = root / kind.replace("/", "-")
            if not model.exists() and arch.startswith("samples/"):
                shutil.copytree(Path(__file__).parents[2] / arch, model)
            elif not model.exists():
                make_model(model, arch, tie_word_embeddings=tied, **{**SIZES, **sizes})
                make_scores(model)
            place = root / key.replace("/", "-")
            plan = make_plan(model, "onnx", "factored", RULES[rule], CONTEXT, PROMPT_BATCH)
            bundle = make_bundle(model, plan, place / "bundle")
            (place / "export").mkdir()
            converter.convert(bundle, place / "export", lambda _: None, EXACT)
            made[key] = Export(place / "export", model, bundle)
        return made[key]

    return make
