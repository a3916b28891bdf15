"""The front matter of a model card: what the hub reads of it, and what it lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acip_export.errors import InputError

# What says that a model was made from none on the hub.
NO_BASE_MODEL = "none"
_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)


def fields_of(text: str, where: str) -> dict[str, Any]:
    """Read the front matter of a card; ``where`` names it in messages. Raises InputError: there is none."""
    import yaml

    try:
        fields = yaml.safe_load(_front(text, where))
    except yaml.YAMLError as error:
        raise InputError(f"the front matter of {where} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"the front matter of {where} has no fields")
    return fields


@dataclass(frozen=True)
class Lacking:
    """What the hub needs, a card lacks, and only its publisher knows.

    Attributes:
        flag: of ``acip-export push``. value: what stands for its value. why: what was found, and what to do.
    """

    flag: str
    value: str
    why: str


def lacking_of(fields: Mapping[str, Any], of_a_model: bool = True) -> list[Lacking]:
    """Return what a card with these fields lacks; ``of_a_model``: it has to say which it was made from."""
    lacking = []
    base_model = fields.get("base_model")
    if of_a_model and not _names_models(base_model):
        what = f"its base_model is {base_model}, which is no model of the hub" if base_model else "it has no base_model"
        why = f"{what}; say which it was made from:  --base-model OWNER/NAME  (or {NO_BASE_MODEL})"
        lacking.append(Lacking("--base-model", "OWNER/NAME", why))
    if not fields.get("license"):
        why = "it has no license; give that of its model:  --license apache-2.0"
        lacking.append(Lacking("--license", "ID", why))
    return lacking


def _names_models(value: object) -> bool:
    """Whether it names models as the hub does."""
    named = value if isinstance(value, list) else [value]
    return bool(named) and all(isinstance(each, str) and _MODEL_ID.fullmatch(each) for each in named)


def completed(text: str, where: str, base_model: str | None = None, license_: str | None = None) -> str:
    """Return a card whose front matter says what is given; without ``base_model`` if that is :data:`NO_BASE_MODEL`.

    Raises:
        InputError: it has no front matter.
    """
    front = before = _front(text, where)
    if base_model == NO_BASE_MODEL:
        front = _without(_without(front, "base_model"), "base_model_relation")
    elif base_model is not None:
        front = _with(front, "base_model", base_model)
    if license_ is not None:
        front = _with(front, "license", license_)
    return text.replace(before, front, 1)


def _front(text: str, where: str) -> str:
    found = _FRONT.match(text)
    if found is None:
        raise InputError(f"{where} has no front matter, which a model card begins with; acip-export report  writes it")
    return found[1]


def _without(front: str, key: str) -> str:
    """Without a field, and the lines that belong to it."""
    return re.sub(rf"^{key}:.*\n(?:[ \t-].*\n)*", "", front, flags=re.MULTILINE)


def _with(front: str, key: str, value: str) -> str:
    return f"{_without(front, key)}{key}: {json.dumps(value)}\n"
