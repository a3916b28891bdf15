"""The commands of samples/ci, taken from those very files, run on a git repository: as a runner would."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from acip_export.cli import main as cli
from tests.support import CORPUS, make_model, make_scores

pytestmark = pytest.mark.slow

CI = Path(__file__).parents[2] / "samples" / "ci"
MARKER = "<!-- acip-export check -->"


def _yaml(name: str) -> dict[Any, Any]:
    data: dict[Any, Any] = yaml.safe_load((CI / name).read_text(encoding="utf-8"))
    return data


GITHUB, COMMENT, GITLAB = _yaml("github-check.yml"), _yaml("github-comment.yml"), _yaml("gitlab-ci.yml")
STEPS = {step.get("name", step.get("uses")): step for step in GITHUB["jobs"]["check"]["steps"]}


class Runner:
    """A repository and a shell in which ``acip-export`` is this checkout's."""

    def __init__(self, root: Path, tools: Path) -> None:
        self.root = root
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("GITHUB_", "GIT_"))},
            "PATH": f"{tools}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@example.com",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@example.com",
        }

    def __call__(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=self.root,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bin")
    command = directory / "acip-export"
    source = Path(__file__).parents[2]
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{source}" exec "{sys.executable}" -m acip_export "$@"\n')
    command.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tools: Path) -> dict[str, Path]:
    """Two exports of one model, made with the workflow's own command at two budgets."""
    place = tmp_path_factory.mktemp("exports")
    make_scores(make_model(place / "model", hidden_size=128, intermediate_size=256, num_hidden_layers=1, head_dim=32))
    (place / "held-out.txt").write_text("".join(CORPUS), encoding="utf-8")
    command = STEPS["Export"]["run"].replace("--context 4096", "--context 64")
    done = Runner(place, tools)(command, **{**GITHUB["env"], "BUDGET": "480kB"})
    assert done.returncode == 0, done.stderr
    made = {"small": (place / "export").rename(place / "small") / "gguf"}
    # The second one in this process, which has imported everything.
    arguments = shlex.split(Template(command).substitute({**GITHUB["env"], "BUDGET": "600kB"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", arguments)
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code
        finally:
            signal.signal(signal.SIGTERM, before[0])
            signal.signal(signal.SIGINT, before[1])
    made["large"] = (place / "export").rename(place / "large") / "gguf"
    return made


@pytest.fixture
def repository(tmp_path: Path, exports: dict[str, Path], tools: Path) -> Runner:
    """On a branch of a repository whose main branch has the small export's baseline committed."""
    run = Runner(tmp_path, tools)
    shutil.copy(CI / "acip-check.toml", tmp_path)
    shutil.copytree(exports["small"], tmp_path / "export" / "gguf")
    done = run(
        "git init -q -b main; acip-export check --update; git add -A; git commit -qm main; git switch -qc change"
    )
    assert done.returncode == 0, done.stderr
    return run


def _replace_export(run: Runner, export: Path) -> None:
    shutil.rmtree(run.root / "export")
    shutil.copytree(export, run.root / "export" / "gguf")


def _check(run: Runner) -> subprocess.CompletedProcess[str]:
    return run(STEPS["Check"]["run"], GITHUB_ACTIONS="true")


def _comment(run: Runner) -> str:
    return (run.root / "comment.md").read_text(encoding="utf-8")


def _counts(run: Runner) -> tuple[int, int]:
    suite = ElementTree.parse(run.root / "check.xml").getroot()[0]
    return int(suite.attrib["failures"]), int(suite.attrib["errors"])


def test_pass(repository: Runner) -> None:
    done = _check(repository)
    assert done.returncode == 0, done.stderr
    assert "identical" in _comment(repository)
    assert _counts(repository) == (0, 0)
    assert "::error" not in done.stderr


def test_growth(repository: Runner, exports: dict[str, Path]) -> None:
    _replace_export(repository, exports["large"])
    done = _check(repository)
    assert done.returncode == 6
    grown = re.search(r"Grown: (\S+\.weight)", done.stderr)
    assert grown is not None, done.stderr
    assert f"| `{grown[1]}` |" in _comment(repository)
    assert _counts(repository) == (1, 0)
    assert re.search(r"^::error file=acip-check\.toml,title=phone%3A max_growth::", done.stderr, re.MULTILINE)
    assert repository("acip-export check --update && git diff --stat -- acip-check.lock.json").returncode == 0
    assert _check(repository).returncode == 0


def test_shrinkage_suggests_tightening(repository: Runner, exports: dict[str, Path]) -> None:
    _replace_export(repository, exports["large"])
    assert repository("acip-export check --update").returncode == 0
    _replace_export(repository, exports["small"])
    done = _check(repository)
    assert done.returncode == 0, done.stderr
    assert "tighten the baseline" in _comment(repository)
    assert "::notice" in done.stderr


def test_missing_file(repository: Runner) -> None:
    shutil.rmtree(repository.root / "export")
    assert _check(repository).returncode == 6
    assert "does not exist" in _comment(repository)
    assert _counts(repository) == (0, 1)


def test_corrupt_file(repository: Runner) -> None:
    model = repository.root / "export" / "gguf" / "model.gguf"
    model.write_bytes(model.read_bytes()[:-5000])
    assert _check(repository).returncode == 6
    assert "is truncated" in _comment(repository)
    assert _counts(repository) == (0, 1)


def test_first_run(repository: Runner) -> None:
    (repository.root / "acip-check.lock.json").unlink()
    done = _check(repository)
    assert done.returncode == 6
    assert "acip-export check --update" in done.stdout
    assert _counts(repository) == (0, 1)


def test_worse_quality(repository: Runner) -> None:
    report = repository.root / "export" / "gguf" / "report.json"
    data = json.loads(report.read_text())
    data["dense_perplexity"]["perplexity"] *= 0.5
    report.write_text(json.dumps(data))
    assert _check(repository).returncode == 6
    assert "of the dense model's quality" in _comment(repository)


def test_gitlab_runs_the_same(repository: Runner, exports: dict[str, Path]) -> None:
    install, command = GITLAB["check-model"]["script"]
    assert install == "pip install acip-export"
    assert command == STEPS["Check"]["run"]
    assert GITLAB["export-model"]["script"][1] == STEPS["Export"]["run"]
    assert repository(command).returncode == 0
    _replace_export(repository, exports["large"])
    assert repository(command).returncode == 6
    assert (repository.root / GITLAB["check-model"]["artifacts"]["reports"]["junit"]).exists()
    assert _comment(repository).splitlines()[0] == GITLAB["comment-model"]["variables"]["MARKER"] == MARKER


def test_pre_commit_hook_blocks_the_commit(repository: Runner, exports: dict[str, Path]) -> None:
    (hook,) = _yaml("pre-commit-config.yaml")["repos"][0]["hooks"]
    tracked = repository("git ls-files").stdout.split()
    assert {name for name in tracked if re.search(hook["files"], name)} == {
        "acip-check.lock.json",
        "acip-check.toml",
        "export/gguf/model.gguf",
        "export/gguf/report.json",
    }
    installed = repository.root / ".git" / "hooks" / "pre-commit"
    installed.write_text(f"#!/bin/sh\nexec {hook['entry']}\n")
    installed.chmod(0o755)
    _replace_export(repository, exports["large"])
    commit = "git add -A && git commit -qm larger"
    blocked = repository(commit)
    assert blocked.returncode != 0
    assert "1 of 1 check failed" in blocked.stdout + blocked.stderr
    assert repository(f"acip-export check --update && {commit}").returncode == 0
    assert "larger" in repository("git log --oneline").stdout


def test_what_runs_foreign_code_cannot_write() -> None:
    """The workflow for pull requests has no rights; the one with rights runs nothing that they bring."""
    triggers = GITHUB[True]  # YAML 1.1 reads the key ``on`` as true
    assert set(triggers) == {"pull_request", "push"}
    assert GITHUB["permissions"] == {"contents": "read"}
    assert COMMENT[True] == {"workflow_run": {"workflows": [GITHUB["name"]], "types": ["completed"]}}
    assert COMMENT["permissions"] == {"actions": "read", "pull-requests": "write"}
    steps = COMMENT["jobs"]["comment"]["steps"]
    assert not any("checkout" in step.get("uses", "") for step in steps)
    artifact = STEPS["actions/upload-artifact@v4"]["with"]["name"]
    assert steps[0]["with"]["name"] == artifact
    for step in [*STEPS.values(), *steps]:
        assert "${{" not in step.get("run", ""), "an expression in a script is an injection"
    gitlab = GITLAB["comment-model"]
    assert gitlab["variables"]["GIT_STRATEGY"] == "none"
    assert "MODEL_COMMENT_TOKEN" in gitlab["rules"][0]["if"]
    assert "MODEL_COMMENT_TOKEN" not in str(GITLAB["check-model"]) + str(GITLAB["export-model"])


# Stands for GitHub's own command line, which needs GitHub: answers what the script asks, keeps what it sends.
GH = """#!/usr/bin/env python3
import json, os, sys
place = os.environ["GH_PLACE"]
arguments = sys.argv[2:]
url = next(a for a in arguments if a.startswith("repos/"))
assert os.environ["GH_TOKEN"] == "t"
if "--jq" in arguments and "/pulls/" in url:
    print(open(place + "/head").read().strip())
elif "--jq" in arguments:
    for name in sorted(os.listdir(place + "/comments"), key=int):
        if open(place + "/comments/" + name).read().startswith(os.environ["MARKER"]):
            print(name)
else:
    body = next(a for a in arguments if a.startswith("body=@"))
    text = open(body.removeprefix("body=@"), encoding="utf-8").read()
    post = arguments[arguments.index("--method") + 1] == "POST"
    name = str(len(os.listdir(place + "/comments")) + 1) if post else url.rsplit("/", 1)[1]
    open(place + "/comments/" + name, "w", encoding="utf-8").write(text)
"""


def test_one_comment_that_is_replaced(repository: Runner, exports: dict[str, Path], tmp_path_factory: Any) -> None:
    place = tmp_path_factory.mktemp("gh")
    (place / "comments").mkdir()
    (place / "comments" / "1").write_text("Looks good to me")
    (place / "head").write_text("abc\n")
    (place / "gh").write_text(GH)
    (place / "gh").chmod(0o755)
    script = COMMENT["jobs"]["comment"]["steps"][1]
    environment = {
        "GH_PLACE": str(place),
        "GH_TOKEN": "t",
        "GH_REPO": "o/r",
        "HEAD_SHA": "abc",
        "MARKER": script["env"]["MARKER"],
        "PATH": f"{place}:{repository.environment['PATH']}",
    }

    def post(number: str = "7") -> subprocess.CompletedProcess[str]:
        repository("rm -rf verdict")
        kept = repository(STEPS["Keep the verdict"]["run"], NUMBER=number)
        assert kept.returncode == 0, kept.stderr
        return repository(script["run"], **environment)

    _check(repository)
    done = post()
    assert done.returncode == 0, done.stderr
    assert "1 check passed" in (place / "comments" / "2").read_text(encoding="utf-8")
    _replace_export(repository, exports["large"])
    _check(repository)
    assert post().returncode == 0
    assert "1 of 1 check failed" in (place / "comments" / "2").read_text(encoding="utf-8")
    assert len(list((place / "comments").iterdir())) == 2

    # Verdicts that a pull request made up.
    before = (place / "comments" / "2").read_text(encoding="utf-8")
    _check(repository)
    assert post("7; rm -rf /").returncode == 1
    _check(repository)
    environment["HEAD_SHA"] = "other"
    assert "not the head" in post().stdout
    assert (place / "comments" / "2").read_text(encoding="utf-8") == before
    assert post().stdout.strip() == "the export failed before the check"
