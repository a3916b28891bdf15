"""Tasks of lm-evaluation-harness, through its own interface for Hugging Face models, on the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.report import TaskMetric
from acip_export.errors import MissingExtraError, UsageError
from acip_export.progress import Progress, ProgressCallback, silent


def require() -> None:
    """Called before any heavy work.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "eval", "--tasks")


def run_tasks(
    model: MaterializedModel, tasks: Sequence[str], progress: ProgressCallback = silent
) -> dict[str, dict[str, TaskMetric]]:
    """Results of a model, rounded as its export is, by task, then by metric (``acc,none`` becomes ``acc``).

    Args:
        tasks: names that the harness knows, or paths of task files (``*.yaml``) of the user's own.

    Raises:
        UsageError: a task that the harness does not know.
    """
    require()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from acip_export.artifacts.materialized import load_materialized
    from acip_export.formats.registry import export_format
    from acip_export.text.packing import load_tokenizer

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    absent = [str(file) for file in files if not file.is_file()]
    # Reading the harness's own thousands of task files takes half a minute; not for tasks that are files themselves.
    places = sorted({str(file.parent.resolve()) for file in files})
    manager = TaskManager(include_path=places, include_defaults=len(files) < len(tasks))
    wanted = [Path(task).stem if Path(task) in files else task for task in tasks]
    unknown = absent + [name for name in wanted if name not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"lm-evaluation-harness has no task {unknown[0]!r}; list its tasks with  lm_eval ls tasks , or give the "
            "path of a task file, whose name is the task's"
        )
    progress(Progress("verify", 0, item=f"lm-evaluation-harness: {', '.join(wanted)}"))
    module = load_materialized(model, export_format(model.plan.format).round_trip)
    harness = HFLM(pretrained=module, tokenizer=load_tokenizer(model.path), device="cpu", batch_size=1)
    found = simple_evaluate(model=harness, tasks=wanted, task_manager=manager, verbosity="ERROR")
    return {task: _metrics(results) for task, results in found["results"].items()}


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
