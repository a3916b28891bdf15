"""Share a ranking among processes: one alone, or those that ``torchrun`` or ``accelerate launch`` started.

Data parallelism: every process holds the model and works on its share of the windows; sums over windows are reduced, so
that every process takes the same steps. The communication is torch.distributed's, set up by accelerate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from acip_export.errors import DataError, MissingExtraError, RankingError, UnsupportedError, UsageError


@dataclass(frozen=True)
class Processes:
    """Describe this process among ``count``; ``index`` 0 is the one that writes and draws.

    Attributes:
        device: where this process computes. mesh: the processes that share one model's weights; ``None``: each has all.
    """

    index: int
    count: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def home(self) -> torch.device:
        """Where a model is loaded to."""
        return self.device if self.mesh is None else torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def batches(self, windows: Tensor, size: int) -> list[tuple[int, Tensor]]:
        """Return this process's share of ``windows`` (n, …) in batches of up to ``size``: (index of the first, batch).

        Raises:
            DataError: fewer windows than processes.
        """
        if len(windows) < self.count:
            raise DataError(f"{len(windows)} windows of text for {self.count} processes; give more text with  --data")
        if self.mesh is not None:
            # To compute is to communicate: all need the same number of batches.
            rounds = min(-(-len(windows) // (size * self.count)), len(windows) // self.count)
            ends = [len(windows) * i // (rounds * self.count) for i in range(rounds * self.count + 1)]
            shares = list(pairwise(ends))[self.index :: self.count]
            return [(start, windows[start:end]) for start, end in shares]
        size = min(size, -(-len(windows) // self.count))
        starts = range(0, len(windows), size)[self.index :: self.count]
        return [(start, windows[start : start + size]) for start in starts]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, on the device and in the dtype of ``tensor``; the same bits everywhere."""
        return self._exchanged(tensor, torch.distributed.all_reduce)

    def from_owner(self, tensor: Tensor, owner: int) -> Tensor:
        """Return what ``tensor`` holds in process ``owner``; the others pass one of the same shape and dtype."""
        return self._exchanged(tensor, partial(torch.distributed.broadcast, src=owner))

    def least(self, number: int) -> int:
        """Return the least of the numbers that all processes give, once all have given one."""
        return int(self._exchanged(torch.tensor(number), partial(torch.distributed.all_reduce, op=ReduceOp.MIN)))

    def as_main(self, answer: bool) -> bool:
        """Return what the main process answers: what only one can know, as the time that has passed, all do alike."""
        return bool(self.from_owner(torch.tensor(float(answer)), 0))

    def wait(self) -> None:
        """Wait until every process is here."""
        self.least(0)

    def _exchanged(self, tensor: Tensor, exchange: Callable[[Tensor], object]) -> Tensor:
        """Return what a collective operation makes of a copy of ``tensor``, which every process has one like."""
        if self.count == 1:
            return tensor
        moved = tensor.detach().to(self.device, copy=True).contiguous()
        exchange(moved)
        return moved.to(tensor.device)


# How accelerate's launcher tells its processes to shard the model: with FSDP, and what is not supported.
_FSDP = "ACCELERATE_USE_FSDP"
_OTHER_SHARDING = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")

# How gloo's errors, which are plain ones, say whose they are.
_GLOO = "gloo"

ALONE = Processes(0, 1, torch.device("cpu"))


def launched_index() -> int:
    """Return this process's index, before anything was set up."""
    return int(os.environ.get("RANK", "0"))


def start_processes(device: str) -> Processes:
    """Join the processes that a launcher started, or go alone.

    Args:
        device: a torch device; ``auto``: the GPU that the launcher gave this process, the first one, or the CPU.

    Raises:
        MissingExtraError: launched without accelerate. UsageError: no such device. UnsupportedError: launched for a
            sharded model.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        other = next((name for name in _OTHER_SHARDING if _is_on(name)), None)
        if other is not None:
            raise UnsupportedError(
                f"{other} asks for a way of sharding that ranking does not know; launch with  --use_fsdp, "
                "or with  --multi_gpu  where the model fits on one device"
            )
        try:
            from accelerate import PartialState
        except ImportError:
            raise MissingExtraError("accelerate", "accelerate", "ranking in several processes") from None
        state: Any = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        mesh = init_device_mesh(state.device.type, (state.num_processes,)) if _is_on(_FSDP) else None
        return Processes(state.process_index, state.num_processes, state.device, mesh)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"torch has no device {name!r} here: {reason}") from error
    return Processes(0, 1, chosen)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


@contextmanager
def lost_process_named() -> Iterator[None]:
    """Turn what a collective operation says when another process has ended into a RankingError.

    Sharded models have such operations of their own.
    """
    try:
        yield
    except RuntimeError as error:
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if alone or (not isinstance(error, torch.distributed.DistError) and _GLOO not in str(error).lower()):
            raise
        reason = str(error).partition("\n")[0].partition(" This is typically")[0]
        raise RankingError(
            f"another process of this ranking has ended, or cannot be reached ({reason}). See what it says, and start "
            "all of them again"
        ) from error


def launch_note(processes: Processes) -> str:
    """Return what a launcher started, in a sentence; empty where there was none."""
    if processes.count > 1:
        return f"ranking in {processes.count} processes, this one on {processes.device}"
    if os.environ.get("ACCELERATE_MIXED_PRECISION") is not None:  # its launcher always says it
        return (
            "the launcher started one process; for more of them without graphics cards, "
            "torchrun --nproc-per-node N -m acip_export rank ..."
        )
    return ""


def check_batch(batch: int, count: int) -> None:
    """Raise UsageError unless ``count`` processes can share ``batch`` windows equally."""
    if batch % count:
        raise UsageError(
            f"{count} processes cannot share {batch} windows per step equally; give a multiple with  --batch"
        )
