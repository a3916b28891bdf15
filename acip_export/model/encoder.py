"""Encoders: what kind a model directory holds, and how its sentence embedding is made. No torch here.

A sentence embedding is read the way sentence-transformers describes it: ``modules.json`` names the steps after the
transformer (pooling, normalisation), ``1_Pooling/config.json`` how tokens become one vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.io.atomic import read_json_object
from acip_export.io.inputs import Count, Positive, read_json
from acip_export.model.architectures import ARCHITECTURES
from acip_export.model.task import EncoderKind, Task

PoolingMode = Literal["mean", "cls", "max"]

# Hugging Face class -> what it is for, and the prefix of its transformer's tensor names.
_CLASSES: dict[str, tuple[EncoderKind, str]] = {
    name: encoder for row in ARCHITECTURES.values() for name, encoder in row.encoders.items()
}
_POOLING_KEYS: dict[str, PoolingMode] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
_MODULES_FILE, _LENGTH_FILE = "modules.json", "sentence_bert_config.json"
_SENTENCE_FILE = "config_sentence_transformers.json"


class _Step(msgspec.Struct, frozen=True):
    """A step of ``modules.json``: its class, and the directory of its settings."""

    type: str
    path: str


class _Settings(msgspec.Struct, frozen=True):
    """Of ``config_sentence_transformers.json``."""

    prompts: dict[str, str | None] | None = None
    default_prompt_name: str | None = None
    truncate_dim: Positive | None = None


class _Length(msgspec.Struct, frozen=True):
    """Of ``sentence_bert_config.json``."""

    max_seq_length: Count | None = None


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one vector; ``normalize``: to unit length."""

    mode: PoolingMode
    normalize: bool


@dataclass(frozen=True)
class SentenceSettings:
    """What sentence-transformers does around the model.

    Attributes:
        prompts: texts that are put before texts, by name. default_prompt: the one that is always, or nothing.
        truncate_dim: numbers of an embedding that are kept; ``None``: all.
    """

    prompts: Mapping[str, str]
    default_prompt: str
    truncate_dim: int | None


@dataclass(frozen=True)
class Encoder:
    """A model that reads whole texts and generates none.

    Attributes:
        kind: ``embedding``: one vector a text. ``masked-lm``: logits a token. ``classification``: logits a text.
        prefix: of the transformer's tensor names, ``bert.`` or nothing.
        pooling: of an ``embedding``; ``None`` for the others.
        max_length: tokens of the longest text, special tokens included.
    """

    kind: EncoderKind
    prefix: str
    pooling: Pooling | None
    max_length: int

    @property
    def word_embeddings(self) -> str:
        return f"{self.prefix}embeddings.word_embeddings.weight"


def task_of(config: Mapping[str, Any]) -> Task:
    """What the model of a ``config.json`` is for."""
    found = _CLASSES.get(_class_of(config))
    return "causal" if found is None else found[0]


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of an encoder that this tool knows."""
    return task_of(config) != "causal"


def kind_of(config: Mapping[str, Any]) -> EncoderKind:
    """The kind of an encoder's ``config.json``."""
    return _CLASSES[_class_of(config)][0]


def encoder_of(config: Mapping[str, Any], model: Path) -> Encoder | None:
    """What the model directory with this ``config.json`` is if it is an encoder, ``None`` for every other model.

    Without ``modules.json`` an embedding is the mean of the token vectors, normalised.

    Raises:
        CheckpointError: damaged pooling files. UnsupportedError: a step that this tool does not know.
    """
    found = _CLASSES.get(_class_of(config))
    if found is None:
        return None
    kind, prefix = found
    positions = int(config.get("max_position_embeddings", 512))
    length = positions
    if (model / _LENGTH_FILE).is_file():
        length = read_json(model / _LENGTH_FILE, _Length, CheckpointError).max_seq_length or length
    pooling = _pooling(model) if kind == "embedding" else None
    return Encoder(kind, prefix, pooling, min(length, positions))


def pools_tokens(model: Path) -> bool:
    """Whether sentence-transformers' files say that tokens are pooled into one vector a text."""
    return any(step == "Pooling" for step, _ in _steps(model))


def sentence_settings(model: Path) -> SentenceSettings:
    """Read ``config_sentence_transformers.json``; without one nothing is done. Raises CheckpointError if damaged."""
    file = model / _SENTENCE_FILE
    found = read_json(file, _Settings, CheckpointError) if file.is_file() else _Settings()
    prompts = {name: prompt for name, prompt in (found.prompts or {}).items() if prompt}
    name = found.default_prompt_name
    if name is not None and name not in (found.prompts or {}):
        raise CheckpointError(f"{file}: default_prompt_name is {name!r}, and prompts has no text of that name")
    return SentenceSettings(prompts, prompts.get(name or "", ""), found.truncate_dim)


def sentence_files(model: Path) -> list[str]:
    """The files below ``model`` that sentence-transformers reads beside the transformer and its tokenizer."""
    names = (_MODULES_FILE, _LENGTH_FILE, _SENTENCE_FILE)
    pooling = sorted(file.relative_to(model).as_posix() for file in model.glob("*_Pooling/config.json"))
    return [name for name in names if (model / name).is_file()] + pooling


def _class_of(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [""])[0])


def _pooling(model: Path) -> Pooling:
    file = model / _MODULES_FILE
    if not file.is_file():
        return Pooling("mean", True)
    mode: PoolingMode = "mean"
    normalize = False
    for step, path in _steps(model):
        if step == "Pooling":
            mode = _mode(model, model / path / "config.json")
        elif step == "Normalize":
            normalize = True
        elif step != "Transformer":
            raise UnsupportedError(
                f"{file} has a step {step!r}; this tool knows Transformer, Pooling and Normalize.\n"
                "Remove the step to compress the model below it"
            )
    return Pooling(mode, normalize)


def _steps(model: Path) -> list[tuple[str, str]]:
    """What follows each other, and the directory of its settings; nothing without ``modules.json``."""
    file = model / _MODULES_FILE
    if not file.is_file():
        return []
    steps = read_json(file, tuple[_Step, ...], CheckpointError)
    return [(step.type.rpartition(".")[2], step.path) for step in steps]


def _mode(model: Path, file: Path) -> PoolingMode:
    config = read_json_object(file, CheckpointError)
    if config.get("include_prompt") is False and sentence_settings(model).prompts:
        raise UnsupportedError(
            f"{file}: include_prompt is false, so that the tokens of a prompt are not pooled; exports pool "
            "every token, and embeddings of texts with a prompt would differ. "
            f"Remove the prompts from {_SENTENCE_FILE} to use none"
        )
    # Newer versions of sentence-transformers write one key, older ones a flag for each mode.
    named = config.get("pooling_mode")
    chosen = (
        [named] if isinstance(named, str) else [key for key, on in config.items() if on is True and "_mode_" in key]
    )
    modes = [_POOLING_KEYS.get(key, key) for key in chosen]
    if len(modes) != 1 or modes[0] not in ("mean", "cls", "max"):
        raise UnsupportedError(
            f"{file} pools by {', '.join(modes) or 'nothing'}; this tool knows mean, cls or max alone"
        )
    return modes[0]  # type: ignore[return-value]
