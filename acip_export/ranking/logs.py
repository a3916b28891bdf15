"""Write the progress of a ranking where it is kept: JSON lines, TensorBoard."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from acip_export.errors import MissingExtraError, UsageError
from acip_export.io.outputs import FileKind
from acip_export.progress import Progress, ProgressCallback

LOG_KIND = FileKind("a log of a ranking", re.compile(rb'\{"time": [\d.]+, "stage": '))


@contextmanager
def json_log(file: Path) -> Iterator[ProgressCallback]:
    """Append one JSON object per report to ``file``: the fields of :class:`Progress`, and ``time`` (Unix seconds).

    It appends, so that a resumed run goes on in the same file; each line is written at once, to be followed.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise UsageError(f"the log {file} cannot be written: {error}; choose another file with  --log-json") from error
    with stream:

        def log(progress: Progress) -> None:
            stream.write(json.dumps({"time": round(time.time(), 3), **asdict(progress)}) + "\n")

        yield log


@contextmanager
def tensorboard_log(directory: Path) -> Iterator[ProgressCallback]:
    """Write ``STAGE/loss``, ``STAGE/ratio`` and ``STAGE/tokens_per_second`` over the steps for TensorBoard.

    Raises:
        MissingExtraError: tensorboard is not installed. UsageError: the directory cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("tensorboard", "tensorboard", "--tensorboard") from None
    try:
        writer: SummaryWriter = SummaryWriter(str(directory))
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be written: {error.strerror}; choose another directory with  --tensorboard"
        ) from error

    def log(progress: Progress) -> None:
        for name in ("loss", "ratio", "tokens_per_second"):
            value = getattr(progress, name)
            if value is not None:
                writer.add_scalar(f"{progress.stage}/{name}", value, progress.done)

    try:
        yield log
    finally:
        writer.close()


def to_all(callbacks: Sequence[ProgressCallback]) -> ProgressCallback:
    """Make one callback that passes every report on."""

    def report(progress: Progress) -> None:
        for callback in callbacks:
            callback(progress)

    return report
