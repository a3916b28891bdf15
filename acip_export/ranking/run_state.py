"""A learned ranking on disk, so that a run that was stopped ends with the ranking it would have had.

A safetensors file (never pickle) beside the score file, written whole or not at all: masks, adapters, their optimizer
state, score maps and arrangements. Not in it: what is random in a step, which follows from the step's number, and
statistics and factors, which come out the same again.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from acip_export.errors import RankingError
from acip_export.io.atomic import new_file, read_safetensors_header
from acip_export.io.outputs import safetensors_kind
from acip_export.ranking.acip_run import AcipRun

_FORMAT = "acip-run"
RUN_KIND = safetensors_kind("a stored run", _FORMAT)


def run_file(out: Path) -> Path:
    """Where the state of an unfinished run is kept: ``NAME.acip.run`` beside the score file."""
    return out.with_name(out.name + ".run")


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a run is stored.

    Attributes:
        file: replaced by every checkpoint. every: steps between them.
        identity: of model, data and settings; a run of another identity is not resumed.
    """

    file: Path
    every: int
    identity: str

    def save(self, run: AcipRun) -> None:
        """Replace the stored state; only one process does it, after all have checked it.

        Raises:
            RankingError: the run has diverged; the state stored before stays.
        """
        run.check()
        if not run.processes.is_main:
            return
        from safetensors.torch import save_file

        metadata = {"artifact": _FORMAT, "identity": self.identity, "counters": json.dumps(run.counters())}
        tensors = {**_optimizer_tensors(run), **run.tensors()}
        with new_file(self.file) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    def load(self, run: AcipRun) -> None:
        """Put ``run``, freshly started, where the stored one was.

        Raises:
            RankingError: no stored run, a damaged one, or one of another model, text or settings.
        """
        from safetensors.torch import load_file

        if not self.file.exists():
            raise RankingError(f"there is no stored run {self.file} to resume; start one without  --resume")
        _, metadata = read_safetensors_header(self.file, RankingError)
        if metadata.get("artifact") != _FORMAT:
            raise RankingError(f"{self.file} is no stored ranking run; remove it and start without  --resume")
        if metadata.get("identity") != self.identity:
            raise RankingError(
                f"{self.file} was stored for another model, text or settings; give the same ones, "
                "or start anew without  --resume"
            )
        tensors = load_file(self.file)
        run.restore(json.loads(metadata["counters"]), tensors)
        for index, parameter in enumerate((*run.masks, *run.adapters)):
            if f"optimizer/{index}/step" in tensors:
                run.optimizer.state[parameter] = {
                    key: tensors[f"optimizer/{index}/{key}"].to("cpu" if key == "step" else run.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }


def _optimizer_tensors(run: AcipRun) -> dict[str, Tensor]:
    state: dict[Any, dict[str, Tensor]] = run.optimizer.state
    return {
        f"optimizer/{index}/{key}": value
        for index, parameter in enumerate((*run.masks, *run.adapters))
        for key, value in state.get(parameter, {}).items()
    }


@contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM only set a flag, which the yielded function tells; a second one acts at once.

    A step that is cut in two cannot be stored. Outside the main thread, where handlers cannot be set, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    raised: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, _frame: FrameType | None) -> None:
        if raised:
            raise KeyboardInterrupt
        raised.append(number)

    for number in signals:
        signal.signal(number, note)
    try:
        yield lambda: bool(raised)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
