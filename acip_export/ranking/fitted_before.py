"""Remember what a ranking was fitted to, so that the same command goes on with the same settings.

How fast a machine is comes out a little different each time, and with it the settings that fit a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import msgspec

from acip_export.errors import AcipError, InputError
from acip_export.io.atomic import read_safetensors_header
from acip_export.io.kept_work import kept_settings
from acip_export.ranking.config import AcipConfig, DataConfig


class FittedSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a ranking that fit, and a digest of what was ``asked``."""

    asked: str
    algorithm: str
    acip: AcipConfig | None
    calibration: DataConfig

    def text(self) -> str:
        """Return the settings as JSON."""
        return msgspec.json.encode(self).decode()


def asked_for(
    algorithm: str, acip: AcipConfig | None, calibration: DataConfig, seconds: float | None, memory: int | None
) -> str:
    """Return a digest of what a ranking is to fit, and of the settings that it would have otherwise."""
    parts = [algorithm, None if acip is None else asdict(acip), asdict(calibration), seconds, memory]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fitted_before(out: Path, run: Path, asked: str) -> FittedSettings | None:
    """Return the settings that a ranking of the same command has had, which was killed or interrupted.

    Args:
        out: the score file. run: where a state of its learning would be.
    """
    for text in _texts(out, run):
        try:
            settings = msgspec.json.decode(text, type=FittedSettings)
        except (msgspec.DecodeError, AcipError):
            continue
        if settings.asked == asked:
            return settings
    return None


def _texts(out: Path, run: Path) -> Iterator[str]:
    yield kept_settings(out)
    if run.exists():
        with suppress(InputError):
            yield read_safetensors_header(run, InputError)[1].get("settings", "")
