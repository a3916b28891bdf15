"""Tasks of lm-evaluation-harness, through its own interface for Hugging Face models, on the reference."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.report import TaskMetric
from acip_export.errors import MissingExtraError, UsageError
from acip_export.io.stamps import stamp_of
from acip_export.progress import Progress, ProgressCallback, silent
from acip_export.verification.unfinished import Unfinished

TaskFigures = dict[str, dict[str, TaskMetric]]

# Suffixes of a user's own tasks, and of what they include.
_TASKS = (".yaml", ".yml")
_INCLUDED = (*_TASKS, ".py")


def require(tasks: Sequence[str]) -> None:
    """Called before any heavy work.

    Raises:
        UsageError: the file of a task is missing. MissingExtraError: lm-evaluation-harness is not installed.
    """
    for task in tasks:
        if _is_file(task):
            with suppress(OSError):  # a name may be too long
                if Path(task).is_file():
                    continue
            raise _unknown(task)
    if find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "eval", "--tasks")


def run_tasks(
    model: MaterializedModel,
    tasks: Sequence[str],
    progress: ProgressCallback = silent,
    unfinished: Unfinished | None = None,
) -> TaskFigures:
    """Results of a model, rounded as its export is, by task, then by metric (``acc,none`` becomes ``acc``).

    Args:
        tasks: names that the harness knows, or paths of task files (``*.yaml``) of the user's own.
        unfinished: keeps the results of each task that is done.

    Raises:
        UsageError: a task that the harness does not know.
    """
    require(tasks)
    harness, found = _Harness(model, tasks), TaskFigures()
    for task in tasks:
        progress(Progress("verify", 0, item=f"lm-evaluation-harness: {_name(task)}"))
        if unfinished is None:
            found |= harness.run(task)
            continue
        name = f"task {hashlib.sha256(task.encode()).hexdigest()[:16]}"
        found |= unfinished.figures(name, task_origin(task), TaskFigures, partial(harness.run, task))
    return found


class _Harness:
    """The harness with a model and its tasks, opened for the first that is run. Raises as :func:`run_tasks`."""

    def __init__(self, model: MaterializedModel, tasks: Sequence[str]) -> None:
        self._model, self._tasks = model, tasks

    def run(self, task: str) -> TaskFigures:
        """Run one of the tasks; a group has the results of those in it, too."""
        from lm_eval import simple_evaluate

        manager, model = self._opened
        found = simple_evaluate(model=model, tasks=[_name(task)], task_manager=manager, verbosity="ERROR")
        return {name: _metrics(results) for name, results in found["results"].items()}

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        """The tasks that there are, and the model."""
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        from acip_export.artifacts.materialized import load_materialized
        from acip_export.formats.registry import export_format
        from acip_export.text.packing import load_tokenizer

        files = [Path(task) for task in self._tasks if _is_file(task)]
        # Reading the harness's own thousands of task files takes half a minute; not for tasks that are files.
        places = sorted({str(file.parent.resolve()) for file in files})
        manager = TaskManager(include_path=places, include_defaults=len(files) < len(self._tasks))
        for name in map(_name, self._tasks):
            if name not in manager.all_tasks:
                raise _unknown(name)
        module = load_materialized(self._model, export_format(self._model.plan.format).round_trip)
        return manager, HFLM(pretrained=module, tokenizer=load_tokenizer(self._model.path), device="cpu", batch_size=1)


def _is_file(task: str) -> bool:
    return task.endswith(_TASKS)


def _name(task: str) -> str:
    return Path(task).stem if _is_file(task) else task


def task_origin(task: str) -> str:
    """Return what tells a task apart: of a user's own, its file, those that it may include, and those that it names."""
    file = Path(task)
    if not _is_file(task) or not file.is_file():
        return task
    named = re.findall(r"[^\s'\"\[\]{},]+", file.read_text(encoding="utf-8", errors="replace"))
    included = (each for each in file.parent.iterdir() if each.suffix in _INCLUDED)
    stamps = []
    for place in sorted({*included, *map(Path, named), *(file.parent / name for name in named)}):
        with suppress(OSError, ValueError):  # what is no name of a file
            if place.is_file():
                stamps.append((str(place), stamp_of(place)))
    return f"{file.resolve()} {stamps}"


def _unknown(task: str) -> UsageError:
    return UsageError(
        f"lm-evaluation-harness has no task {task!r}; list its tasks with  lm_eval ls tasks , or give the path of a "
        "task file, whose name is the task's"
    )


def _metrics(results: Mapping[str, Any]) -> dict[str, TaskMetric]:
    metrics = {}
    for key, value in results.items():
        name, _, filtered = key.partition(",")
        if name.endswith("_stderr") or not isinstance(value, int | float) or isinstance(value, bool):
            continue
        error = results.get(f"{name}_stderr,{filtered}")
        label = name if filtered in ("", "none") else key
        usable = isinstance(error, int | float) and isfinite(error)
        metrics[label] = TaskMetric(float(value), float(error) if usable and error is not None else None)
    return metrics
