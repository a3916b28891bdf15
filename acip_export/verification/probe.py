"""A process that opens an export, fills its context, generates, and says what that took: memory, time, speed.

Run by :mod:`acip_export.verification.process`, never imported: what it holds is what is measured.

    python -m acip_export.verification.probe MODULE CLASS EXPORT RESULT measure ASKED
    python -m acip_export.verification.probe MODULE CLASS EXPORT RESULT logits WINDOWS

``ASKED`` is a JSON file: ``measure`` also continues its ``prompt`` by ``count`` tokens, and tokenizes its ``texts``.
``logits`` writes those of every window of the file ``WINDOWS`` to standard output, rows and columns (two int64) first.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import Plan, Serving, load_plan
from acip_export.artifacts.report import Speed
from acip_export.errors import AcipError, MissingExtraError
from acip_export.formats.session import RuntimeSession
from acip_export.model.tensor_names import is_embedding

_NEW_TOKENS = 32
# Short contexts are filled again for a better measurement of speed, as long as that is cheap.
_REPETITIONS, _CHEAP_SECONDS = 3, 2.0
_STATUS = Path("/proc/self/status")


def resident(*fields: str) -> list[int] | None:
    """Bytes of fields of ``/proc/self/status``; ``None`` where the system has no such file."""
    if not _STATUS.is_file():
        return None
    found = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return [int(found[field].split()[0]) * 1024 for field in fields]


def forget_peak() -> None:
    """Start counting the peak anew, so that importing this module's own needs does not hide the runtime's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak of imports is a few MiB, and rarely above what follows
        return


def spread_tokens(vocabulary: int, count: int) -> list[int]:
    """``count`` token ids from all over the vocabulary, so that as much of the embedding as possible is read."""
    return [index * vocabulary // count for index in range(count)]


def measure(
    session_class: Callable[[Path, Serving], Any], export: Path, plan: Plan, asked: dict[str, Any]
) -> dict[str, Any]:
    """The figures, as :class:`acip_export.verification.process.ProcessFigures` reads them.

    Args:
        asked: what else is wanted, once everything is measured.
    """
    serving = plan.serving
    vocabulary = max(decision.shape[0] for decision in plan.tensors if is_embedding(decision.name))
    generates = plan.task == "causal"
    new_tokens = min(_NEW_TOKENS, serving.context // 2) if generates else 0
    prompt = spread_tokens(vocabulary, serving.context - new_tokens if generates else serving.prompt_batch)
    gc.collect()
    forget_peak()
    before = resident("VmRSS", "RssAnon")
    start = time.perf_counter()
    with session_class(export, serving) as session:
        load_seconds = time.perf_counter() - start
        speeds = [session.speed(prompt, new_tokens)]
        # Before the repetitions: how many there are, and so what the allocator keeps, depends on the machine's speed.
        after = resident("VmHWM", "RssAnon", "RssFile", "RssShmem")
        while len(speeds) < _REPETITIONS and time.perf_counter() - start < _CHEAP_SECONDS:
            speeds.append(session.speed(prompt, new_tokens))
        decode = max((s.decode for s in speeds if s.decode is not None), default=None)
        best = Speed(max(s.prefill for s in speeds), decode, len(prompt), new_tokens)
        memory = None
        if before is not None and after is not None:
            peak, anonymous, mapped, shared = after
            memory = {
                "peak_bytes": peak - before[0],
                "anonymous_bytes": anonymous,
                "file_bytes": mapped + shared,
                "interpreter_bytes": before[0],
                "interpreter_anonymous_bytes": before[1],
            }
        return {
            "runtime": session.name,
            "load_seconds": load_seconds,
            "memory": memory,
            "speed": dataclasses.asdict(best),
            "greedy": session.greedy(asked["prompt"], asked["count"]) if asked["count"] else [],
            "tokens": _tokens(session, asked["texts"]),
        }


def _tokens(session: Any, texts: list[str]) -> list[list[int]] | None:
    found = [session.tokenize(text) for text in texts]
    return None if None in found else found


def write_logits(
    session_class: Callable[[Path, Serving], RuntimeSession],
    export: Path,
    plan: Plan,
    windows: Path,
    channel: BinaryIO,
) -> dict[str, Any]:
    """Write the logits of one window after the other."""
    with session_class(export, plan.serving) as session:
        for logits in session.logits(np.load(windows)):
            channel.write(np.array(logits.shape, np.int64).data)
            channel.write(np.ascontiguousarray(logits, np.float32).data)
            channel.flush()
        return {"runtime": session.name}


def main() -> None:
    module, class_name, export, result, what, given = sys.argv[1:]
    answer: dict[str, Any]
    # What the runtime prints goes to standard error: standard output is ours.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        plan = load_plan(Path(export) / PLAN_FILE)
        session_class = getattr(import_module(module), class_name)
        if what == "logits":
            answer = write_logits(session_class, Path(export), plan, Path(given), channel)
        else:
            asked = json.loads(Path(given).read_text(encoding="utf-8"))
            answer = {"figures": measure(session_class, Path(export), plan, asked)}
    except MissingExtraError as error:
        answer = {"missing": error.fields}
    except AcipError as error:
        answer = {"error": str(error)}
    Path(result).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
