"""Store a learned ranking, so that a run that was stopped ends with the ranking it would have had.

A run state is a safetensors file (never pickle) beside the score file, written whole or not at all: masks, adapters,
their optimizer's state, score maps and arrangements. Not in it: what is random in a step, which follows from the step's
number, and statistics and factors, which are kept as those of any ranking (:mod:`acip_export.io.kept_work`), or come
out the same again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from acip_export.errors import RankingError
from acip_export.io.atomic import new_file, read_safetensors_header
from acip_export.io.outputs import safetensors_kind
from acip_export.ranking.processes import Processes

_ARTIFACT = "acip-run"
RUN_KIND = safetensors_kind("a run state of a ranking", _ARTIFACT)


class Run(Protocol):
    """A run that can be stored between two steps; see :class:`acip_export.ranking.acip_run.AcipRun`."""

    processes: Processes

    def check(self) -> None: ...
    def counters(self) -> dict[str, Any]: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def restore(self, counters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None: ...


def run_file(out: Path) -> Path:
    """Return where the state of an unfinished run is kept: ``NAME.acip.run`` beside the score file."""
    return out.with_name(out.name + ".run")


class RunStates:
    """Store the state of a run by time: a process that is killed loses no more, however long a step takes.

    Attributes:
        file: replaced by every state. seconds: of learning that may be lost; 0: every step is stored.
        resume: whether to go on from the one that is there. settings: stored with it, see :mod:`.fitted_before`.
    """

    def __init__(self, file: Path, seconds: float, resume: bool, settings: str = "") -> None:
        self.file, self.seconds, self.resume, self.settings = file, seconds, resume, settings
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._stored = self._stepped = time.monotonic()

    def due(self) -> bool:
        """Tell, after every step, whether another one that is as long would end too late to be stored then."""
        now = time.monotonic()
        step, self._stepped = now - self._stepped, now
        return now - self._stored + step >= self.seconds

    def save(self, run: Run, identity: str) -> None:
        """Replace the stored state; only one process does it, after all have checked it.

        Raises:
            RankingError: the run has diverged; the state stored before stays.
        """
        self._stored = time.monotonic()
        run.check()
        if not run.processes.is_main:
            return
        from safetensors.torch import save_file

        metadata = {"artifact": _ARTIFACT, "identity": identity, "counters": json.dumps(run.counters())}
        metadata["settings"] = self.settings
        with new_file(self.file) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in run.tensors().items()}, temporary, metadata)
        self._stepped = time.monotonic()

    def load(self, run: Run, identity: str) -> None:
        """Put ``run``, freshly started, where the stored one was.

        Args:
            identity: of model, text and settings; a run of another one is not gone on with.

        Raises:
            RankingError: no run state, a damaged one, or one of another model, text or settings.
        """
        from safetensors.torch import load_file

        if not self.file.exists():
            raise RankingError(f"there is no run state {self.file} to resume; start a run without  --resume")
        _, metadata = read_safetensors_header(self.file, RankingError)
        if metadata.get("artifact") != _ARTIFACT:
            raise RankingError(f"{self.file} is no run state of a ranking; remove it and start without  --resume")
        if metadata.get("identity") != identity:
            raise RankingError(
                f"{self.file} was stored for another model, text or settings; give the same ones, "
                "or start anew without  --resume"
            )
        run.restore(json.loads(metadata["counters"]), load_file(self.file))
