"""A process that opens an export, fills its context, generates, and says what that took: memory, time, speed.

Run by :mod:`acip_export.verification.process`, never imported: what it holds is what is measured.

    python -m acip_export.verification.probe MODULE CLASS EXPORT RESULT
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import Plan, Serving, load_plan
from acip_export.artifacts.report import Speed
from acip_export.errors import AcipError, MissingExtraError
from acip_export.formats.session import ProbedSession
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


def measure(session_class: Callable[[Path, Serving], ProbedSession], export: Path, plan: Plan) -> dict[str, Any]:
    """The figures, as :class:`acip_export.verification.process.ProcessFigures` reads them."""
    serving = plan.serving
    vocabulary = max(decision.shape[0] for decision in plan.tensors if is_embedding(decision.name))
    generates = plan.task == "causal"
    new_tokens = min(_NEW_TOKENS, serving.context // 2) if generates else 0
    prompt = spread_tokens(vocabulary, serving.context - new_tokens if generates else serving.prompt_batch)
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
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
            }
        return {
            "runtime": session.name,
            "load_seconds": load_seconds,
            "memory": memory,
            "speed": dataclasses.asdict(best),
        }


def main() -> None:
    module, class_name, export, result = sys.argv[1:]
    try:
        plan = load_plan(Path(export) / PLAN_FILE)
        answer: dict[str, Any] = {"figures": measure(getattr(import_module(module), class_name), Path(export), plan)}
    except MissingExtraError as error:
        answer = {"missing": error.fields}
    except AcipError as error:
        answer = {"error": str(error)}
    Path(result).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
