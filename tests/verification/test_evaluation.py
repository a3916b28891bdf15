"""Tasks of lm-evaluation-harness on a bundle: a local task over local data, so that nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acip_export.api.verify import verify_directory
from acip_export.artifacts.bundle import Bundle, load_bundle
from acip_export.artifacts.report import Report
from acip_export.errors import MissingExtraError, UsageError
from acip_export.formats.registry import export_format
from acip_export.progress import Progress
from acip_export.text.packing import load_tokenizer
from acip_export.verification import harness as evaluation
from acip_export.verification import unfinished
from acip_export.verification.export import verify_export
from tests.verification.conftest import MakeExport

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval (extra: eval)")
# datasets and the harness warn about their own dependencies.
pytestmark = pytest.mark.filterwarnings("default")

QUESTIONS = [
    {"question": "def main(argv: list[str]) ->", "choices": [" int", " fox", "你好"], "answer": 0},
    {"question": "The quick brown", "choices": [" class", " fox", " Bar"], "answer": 1},
    {"question": "class Foo(Bar):", "choices": ["\n\tdef", " jump", " naïve"], "answer": 0},
    {"question": "emoji:", "choices": [" 🎉", " return", " self"], "answer": 0},
]
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "questions.json"
    data.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    file = tmp_path / "tiny_choice.yaml"
    file.write_text(TASK.format(data=data), encoding="utf-8")
    return file


@needs_harness
def test_a_local_task_gives_what_the_bundle_says(exported: MakeExport, task: Path) -> None:
    made = exported("gguf")
    found = evaluation.run_tasks(Bundle.open(made.bundle), [str(task)])
    assert set(found) == {"tiny_choice"}
    # The same choice by hand: the most likely continuation.
    model = load_bundle(made.bundle, export_format(Bundle.open(made.bundle).plan.format).round_trip)
    tokenizer = load_tokenizer(made.bundle)

    def loglikelihood(question: str, choice: str) -> float:
        whole = tokenizer(question + choice)["input_ids"]
        start = len(tokenizer(question)["input_ids"])
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logs[i - 1, whole[i]]) for i in range(start, len(whole)))

    right = [
        max(range(3), key=lambda i: loglikelihood(q["question"], q["choices"][i])) == q["answer"] for q in QUESTIONS
    ]
    accuracy = found["tiny_choice"]["acc"]
    assert accuracy.value == sum(right) / len(right)
    assert accuracy.standard_error is not None


@pytest.mark.slow
@needs_harness
def test_tasks_that_are_done_are_not_run_again(
    exported: MakeExport, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verification that is interrupted goes on with the next task."""
    import lm_eval

    evaluate, ran = lm_eval.simple_evaluate, list[str]()

    def counted(**arguments: Any) -> Any:
        ran.extend(arguments["tasks"])
        return evaluate(**arguments)

    monkeypatch.setattr(lm_eval, "simple_evaluate", counted)
    monkeypatch.setattr(unfinished, "_WORTH_KEEPING", 0.0)
    second = task.with_name("second.yaml")
    second.write_text(task.read_text(encoding="utf-8").replace("tiny_choice", "second"), encoding="utf-8")
    made, place = exported("gguf"), tmp_path / "place"
    export = Path(shutil.copytree(made.export, place / "export"))

    def verify(progress: Callable[[Progress], None] = lambda _: None) -> Report:
        ran.clear()
        tasks = [str(task), str(second)]
        return verify_directory(export, str(made.model), None, made.bundle, None, tasks, progress=progress)

    def stop(progress: Progress) -> None:
        if progress.item.endswith(": second"):
            raise KeyboardInterrupt

    whole = verify()
    assert ran == ["tiny_choice", "second"] and whole.tasks is not None and set(whole.tasks) == set(ran)
    with pytest.raises(KeyboardInterrupt):
        verify(stop)
    assert ran == ["tiny_choice"]
    assert verify().tasks == whole.tasks
    assert ran == ["second"]
    assert list(place.iterdir()) == [export]
    # What a task is made of has changed.
    with pytest.raises(KeyboardInterrupt):
        verify(stop)
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS[:3]), encoding="utf-8")
    assert verify().tasks is not None
    assert ran == ["tiny_choice", "second"]


@pytest.mark.slow
@needs_harness
def test_unknown_tasks_say_so(exported: MakeExport) -> None:
    with pytest.raises(UsageError, match=r"missing\.yaml"):
        evaluation.run_tasks(Bundle.open(exported("gguf").bundle), ["missing.yaml"])


def test_without_the_harness_nothing_is_begun(exported: MakeExport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "find_spec", lambda _: None)
    made = exported("gguf")
    with pytest.raises(MissingExtraError, match=r"acip-export\[eval\]") as caught:
        verify_export(made.export / "not even looked at", Bundle.open(made.bundle), tasks=["arc_easy"])
    assert caught.value.exit_code == 7
