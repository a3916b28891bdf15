"""Marked graphs, kept in the user's cache directory.

A marked graph has one node of the domain :data:`converters.onnx.graph.decided.MARKS` for everything that has weights.
It depends on the configuration and on what makes it, never on a plan. Making one takes seconds (the model builder) to
minutes (torch.onnx); a plan costs a walk over its nodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from acip_export.io.atomic import keep, user_cache
from acip_export.version import __version__

_HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Recipe:
    """What a marked graph depends on.

    Attributes:
        settings: what it is made of, as text. packages: what makes it. sources: our files that make it, in
            converters/onnx. make: returns the serialized graph of ``settings``.
    """

    settings: str
    packages: tuple[str, ...]
    sources: tuple[str, ...]
    make: Callable[[str], bytes]


def marked_graph(recipe: Recipe) -> onnx.ModelProto:
    """The graph of a recipe, made once; callers must not change it."""
    return _marked_graph(recipe, user_cache() / "graphs" / f"{_key(recipe)}.onnx")


@lru_cache(maxsize=2)
def _marked_graph(recipe: Recipe, file: Path) -> onnx.ModelProto:
    with contextlib.suppress(OSError, DecodeError):
        kept = onnx.ModelProto.FromString(file.read_bytes())
        if kept.graph.node:
            return kept
    made = recipe.make(recipe.settings)
    keep(file, made, "the graph is made")
    return onnx.ModelProto.FromString(made)


@lru_cache(maxsize=2)
def _key(recipe: Recipe) -> str:
    key = hashlib.sha256()
    for source in recipe.sources:
        key.update((_HERE / source).read_bytes())
    key.update(json.dumps([__version__, *map(_release, recipe.packages), recipe.settings]).encode())
    return key.hexdigest()


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
