"""Say what is kept to save time, how much it is, and remove it.

What commands of acip-export made they make again where it is missing. The rest of the user's cache is made by hand: its
entries are removed by name alone.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from acip_export.errors import OutputError
from acip_export.io.atomic import user_cache
from acip_export.io.stamps import Stamp, stamp_of

# By directory: what is in it and what it takes again.
_OWN = {
    "feedback": "factors of error feedback, by second moment: up to a minute each",
    "graphs": "ONNX graphs, by configuration: seconds to a minute each",
    "weights": "hashes of models' weights: a reading of each",
}
# And by hand: with what.
_BY_HAND = {
    "llama-cpp": ("llama.cpp with factor pairs, built: ten minutes", "make llama-cpp"),
    "real": (
        "the real model of tests and benchmarks: a download and a minute; rankings kept beside it: up to an hour each",
        "make real-model",
    ),
    "consumers": ("other programs that tests open exports with: a download", "make consumers"),
    "rivals": ("what benchmarks compare exports with: downloads and hours", "make bench-rivals"),
}
# Of layers and classes of them, of plans, and of types of KV cache; what is unfinished ends on another suffix.
_LOSSES = ("losses", "candidates", "kv-cache")
_ROUNDING = "rounding"
_FACTORS = re.compile(r"[0-9a-f]{64}\.safetensors")


@dataclass(frozen=True)
class Kept:
    """A cache.

    Attributes:
        name: what to call it. purpose: what is in it, and what it takes to make it again.
        places: the files and directories that it consists of.
        by_hand: whether no command of acip-export makes it again. made_with: what does; ``None``: not known.
    """

    name: str
    purpose: str
    places: tuple[Path, ...]
    by_hand: bool = False
    made_with: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        stamps = (stamp_of(file) for place in self.places for file in _files(place))
        return sum(stamp.size for stamp in stamps if stamp is not None)

    def remove(self) -> None:
        """Remove it.

        Raises:
            OutputError: the system does not let us.
        """
        for place in self.places:
            try:
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
            except OSError as reason:
                raise OutputError(f"{place} cannot be removed: {reason.strerror}") from reason


def find_caches(model: Path | None = None, factors: Path | None = None) -> list[Kept]:
    """Return the user's caches, what was measured beside the score files of ``model``, and a directory of factors."""
    home = user_cache()
    found = [_kept_in(place) for place in sorted(home.iterdir() if home.is_dir() else ()) if place.is_dir()]
    if model is not None:
        rounding = tuple(sorted(model.glob(f"*.acip.{_ROUNDING}-*.json")))
        found.append(Kept("rounding", f"rounding errors measured on {model.resolve().name}: minutes", rounding))
        losses = tuple(sorted(file for kind in _LOSSES for file in model.glob(f"*.acip.{kind}-*.json*")))
        found.append(Kept("losses", f"losses measured on {model.resolve().name}: minutes", losses))
    if factors is not None:
        kept = tuple(sorted(file for file in factors.glob("*.safetensors") if _FACTORS.fullmatch(file.name)))
        found.append(Kept("factors", f"singular components in {factors}: minutes to hours", kept))
    return [each for each in found if each.places]


def _kept_in(place: Path) -> Kept:
    if place.name in _OWN:
        return Kept(place.name, _OWN[place.name], (place,))
    purpose, made_with = _BY_HAND.get(place.name, ("not of this version", None))
    return Kept(place.name, purpose, (place,), by_hand=True, made_with=made_with)


def measured_beside(scores: Path) -> dict[Path, Stamp]:
    """Return the files of what plans have measured with a score file, and what tells whether they have changed."""
    files = (scores.with_name(found) for kind in (_ROUNDING, *_LOSSES) for found in _beside(scores, kind))
    # Another process may remove or replace one meanwhile.
    return {file: stamp for file in files if (stamp := stamp_of(file)) is not None}


def _beside(scores: Path, kind: str) -> list[str]:
    start = f"{scores.name}.{kind}-"
    return sorted(
        file.name for file in scores.parent.iterdir() if file.name.startswith(start) and file.suffix == ".json"
    )


def _files(place: Path) -> Iterator[Path]:
    yield from (
        (file for file in place.rglob("*") if file.is_file() and not file.is_symlink()) if place.is_dir() else [place]
    )
