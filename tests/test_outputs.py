"""No command destroys what it did not write: every output is refused that is, holds or lies in what is read, or that
would replace anything else than what acip-export wrote itself. See acip_export/io/outputs.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

from acip_export.api import convert_bundle, materialize_bundle, plan_export, write_imatrix
from acip_export.artifacts.export_directory import EXPORT_KIND
from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import PLAN_KIND, load_plan, save_plan
from acip_export.errors import OutputError, UsageError
from acip_export.io.atomic import new_directory
from acip_export.io.outputs import claim_output
from acip_export.io.processes import module_environment
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from acip_export.verification.export import check_bytes
from tests.check.models import write_gguf
from tests.support import CORPUS, Run, make_model, make_scores, unspaced

BUDGET = ("--budget", "400kB", "--budget-scope", "file", "--format", "gguf", "--types", "q8_0,q4_0", "--context", "64")
MAIN = ("-m", "model", *BUDGET, "--no-verify", "--force", "-o")
PLAN = ("plan", "-m", "model", *BUDGET, "--force", "-o")
SWEEP = ("plan", "--sweep", "-m", "model", "--format", "gguf", "--force", "-o")
MATERIALIZE = ("materialize", "plan.json", "-m", "model", "--force", "-o")
CONVERT = ("convert", "bundle", "--force", "-o")
RANK = ("rank", "model", "--data", "text.txt", "--algorithm", "magnitude", "--context", "32", "--force")
IMATRIX = ("imatrix", "model/model.acip", "-m", "model", "--force", "-o")
CHECK = ("check", "--config", "check/acip-check.toml")
REPORT = ("report", "export")
VERIFY = ("verify", "export", "--bundle", "bundle")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one of everything that commands read and write, and with things of the user's."""
    place = tmp_path_factory.mktemp("outputs") / "place"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2}
    model = make_model(place / "model", num_hidden_layers=1, num_key_value_heads=1, **sizes)
    (model / "README.md").write_text("# The user's model card\n")
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    plan = plan_export(checkpoint, scores, PlanRequest("gguf", 400_000, "file", types=("q8_0", "q4_0"), context=64))
    save_plan(plan, place / "plan.json")
    materialize_bundle(checkpoint, scores, plan, place / "bundle")
    convert_bundle(place / "bundle", place / "export")
    write_imatrix(checkpoint, scores, place / "imatrix.gguf")
    (place / "text.txt").write_text("".join(CORPUS) * 20, encoding="utf-8")
    for folder in ("home", "folder"):
        (place / folder).mkdir()
        (place / folder / "notes.txt").write_text(f"of {folder}")
    write_gguf(place / "check" / "m.gguf")
    (place / "check" / "acip-check.toml").write_text('[[check]]\npath = "m.gguf"\nmax_bytes = "1MB"\n')
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in, which is also where the user's home lies."""
    copy = tmp_path / "place"
    shutil.copytree(made, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(copy / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return copy


def snapshot(directory: Path) -> dict[str, str]:
    """Everything below a directory, and what is in it."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            kind = f"-> {path.readlink()}"
        elif path.is_file():
            kind = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            kind = "directory" if path.is_dir() else "special"
        found[str(path.relative_to(directory))] = kind
    return found


@dataclass(frozen=True)
class Case:
    """A command that must be refused, what it names, and what is there beforehand.

    No case names anything outside the test's own directory, so that a fault here harms nobody.
    """

    arguments: tuple[str, ...]
    says: str
    before: Callable[[Path], object] = lambda _: None


def write(name: str, text: str = "the user's") -> Callable[[Path], object]:
    def prepare(place: Path) -> object:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        return (place / name).write_text(text)

    return prepare


def link(name: str, to: str) -> Callable[[Path], object]:
    return lambda place: (place / name).symlink_to(to)


def hard_link(name: str, to: str) -> Callable[[Path], object]:
    return lambda place: (place / name).hardlink_to(place / to)


def move(name: str, to: str) -> Callable[[Path], object]:
    return lambda place: shutil.move(place / name, place / to)


def _measured_elsewhere(place: Path) -> None:
    """An importance matrix as llama-imatrix writes it: hours of somebody's work."""
    writer = gguf.GGUFWriter(place / "theirs.gguf", "")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _linked_out(place: Path) -> None:
    """The user moved the large file elsewhere."""
    file = next((place / "export").glob("*.gguf"))
    shutil.move(file, place / "large.gguf")
    file.symlink_to(place / "large.gguf")


def _edited(place: Path) -> None:
    file = next((place / "export").glob("*.gguf"))
    file.write_bytes(file.read_bytes() + b"mine")


def _verified(place: Path) -> None:
    """A report that stands beside a page of somebody else's."""
    (place / "export" / "report.json").write_text('{"artifact": "acip-report"}')
    (place / "export" / "report.html").write_text("<!doctype html><title>my own</title>")


CASES = {
    # The model is the output.
    "main onto the model": Case((*MAIN, "model"), "model"),
    "main onto the model, a dot behind": Case((*MAIN, "model/."), "model"),
    "main onto the model, from its side": Case((*MAIN, "folder/../model"), "model"),
    "main onto the model through a link": Case((*MAIN, "link"), "model", link("link", "model")),
    "main onto what holds the model": Case(
        ("-m", "outer/model", *MAIN[2:], "outer"), "outer", lambda p: shutil.copytree(p / "model", p / "outer/model")
    ),
    "main from inside the model": Case((*MAIN, "model/../model/"), "model"),
    "materialize onto the model": Case((*MATERIALIZE, "model"), "model"),
    "convert onto the model": Case((*CONVERT, "model"), "model"),
    # A directory of the user's.
    "main onto a folder": Case((*MAIN, "folder"), "folder/notes.txt"),
    "main onto a folder without --force": Case((*MAIN[:-2], "-o", "folder"), "folder/notes.txt"),
    "main onto the home": Case((*MAIN, "home"), "home"),
    "main onto here": Case((*MAIN, "."), "current directory"),
    "main onto nothing, which is here": Case((*MAIN, ""), "current directory"),
    "main onto above": Case((*MAIN, ".."), "current directory"),
    "materialize onto a folder": Case((*MATERIALIZE, "folder"), "folder/notes.txt"),
    "convert onto a folder": Case((*CONVERT, "folder"), "folder/notes.txt"),
    "a folder of folders": Case((*MAIN, "deep"), "deep/a", lambda p: (p / "deep/a/b").mkdir(parents=True)),
    "a foreign plan.json": Case((*MAIN, "folder"), "folder/", write("folder/plan.json", '{"steps": []}')),
    "a plan.json of nonsense": Case((*MAIN, "folder"), "folder/", write("folder/plan.json", "{")),
    "a plan.json nested without end": Case((*MAIN, "folder"), "folder", write("folder/plan.json", "[" * 99999)),
    "our plan beside the user's files": Case(
        (*MAIN, "folder"), "folder/notes.txt", lambda p: shutil.copy(p / "plan.json", p / "folder")
    ),
    # An export or a bundle in which something else is.
    "an export with a file more": Case((*MAIN, "export"), "export/notes.txt", write("export/notes.txt")),
    "an export with a hidden file": Case((*MAIN, "export"), "export/.env", write("export/.env")),
    "an export in which git is": Case((*CONVERT, "export"), "export/.git/HEAD", write("export/.git/HEAD")),
    "an export with a folder": Case((*CONVERT, "export"), "export/sub", lambda p: (p / "export/sub").mkdir()),
    "an export with a link": Case((*CONVERT, "export"), "export/sub", link("export/sub", "../folder")),
    "an export whose weights are a link": Case((*CONVERT, "export"), "export/model.gguf", _linked_out),
    "an export that was changed": Case((*CONVERT, "export"), "export/model.gguf", _edited),
    "an export with a card of the user's": Case((*CONVERT, "export"), "export/README.md", write("export/README.md")),
    "an export with a page of the user's": Case((*CONVERT, "export"), "export/report.html", _verified),
    "an export in place of a bundle": Case((*MATERIALIZE, "export"), "export"),
    "a bundle with a file more": Case((*MATERIALIZE, "bundle"), "bundle/notes.txt", write("bundle/notes.txt")),
    "a bundle whose card is the user's": Case((*MATERIALIZE, "bundle"), "bundle/README.md", write("bundle/README.md")),
    # A file where a directory is to be written.
    "main onto a file": Case((*MAIN, "text.txt"), "text.txt"),
    "main onto an empty file": Case((*MAIN, "empty"), "empty", write("empty", "")),
    "main onto a pipe": Case((*MAIN, "pipe"), "pipe", lambda p: os.mkfifo(p / "pipe")),
    "main onto the score file": Case((*MAIN, "model/model.acip"), "model.acip"),
    "materialize onto its plan": Case((*MATERIALIZE, "plan.json"), "plan.json"),
    "convert onto a file": Case((*CONVERT, "text.txt"), "text.txt"),
    "a link to itself": Case((*MAIN, "loop"), "loop", link("loop", "loop")),
    # A link to a directory of the user's.
    "a link to a folder": Case((*MAIN, "link"), "link/notes.txt", link("link", "folder")),
    "a link to an export with a file more": Case(
        (*MAIN, "link"), "notes.txt", lambda p: (link("link", "export")(p), write("export/notes.txt")(p))
    ),
    # The bundle is the output, holds it, or lies in it.
    "convert onto its bundle": Case((*CONVERT, "bundle"), "bundle"),
    "convert into its bundle": Case((*CONVERT, "bundle/export"), "bundle"),
    "convert onto what holds its bundle": Case(
        ("convert", "outer/bundle", "--force", "-o", "outer"),
        "outer/bundle",
        lambda p: ((p / "outer").mkdir(), move("bundle", "outer")(p)),
    ),
    "convert onto its bundle through a link": Case((*CONVERT, "link"), "bundle", link("link", "bundle")),
    # Scores.
    "rank onto the configuration": Case((*RANK, "-o", "model/config.json"), "config.json"),
    "rank onto the weights": Case((*RANK, "-o", "model/model.safetensors"), "model.safetensors"),
    "rank onto the weights' other name": Case(
        (*RANK, "-o", "other.acip"), "other.acip", hard_link("other.acip", "model/model.safetensors")
    ),
    "rank into the weights": Case((*RANK, "-o", "model/scores.safetensors"), "model/scores.safetensors"),
    "rank onto its text": Case((*RANK, "-o", "text.txt"), "text.txt"),
    "rank onto its text's other name": Case((*RANK, "-o", "t"), "t", hard_link("t", "text.txt")),
    "rank onto its text through a link": Case((*RANK, "-o", "t"), "text.txt", link("t", "text.txt")),
    "rank onto nothing, which is here": Case((*RANK, "-o", ""), "current directory"),
    "rank onto a folder": Case((*RANK, "-o", "folder"), "folder"),
    "rank onto the plan": Case((*RANK, "-o", "plan.json"), "plan.json"),
    "rank beside a run that is none": Case((*RANK, "-o", "s.acip"), "s.acip.run", write("s.acip.run")),
    "rank into its own texts": Case(
        ("rank", "model", "--data", "folder", *RANK[4:], "-o", "folder/s.acip"), "folder/s.acip"
    ),
    "log into the weights": Case((*RANK, "--log-json", "model/model.safetensors"), "model.safetensors"),
    "log into the text": Case((*RANK, "--log-json", "text.txt"), "text.txt"),
    "log into the scores": Case((*RANK, "--log-json", "model/model.acip"), "model.acip"),
    # Plans and sweeps.
    "plan onto the configuration": Case((*PLAN, "model/config.json"), "config.json"),
    "plan onto the tokenizer": Case((*PLAN, "model/tokenizer.json"), "tokenizer.json"),
    "plan onto the scores": Case((*PLAN, "model/model.acip"), "model.acip"),
    "plan onto nothing, which is here": Case((*PLAN, ""), "current directory"),
    "plan onto an export": Case((*PLAN, "export"), "export"),
    "plan onto the bundle's manifest": Case((*PLAN, "bundle/bundle.json"), "bundle.json"),
    "plan onto the importance": Case((*PLAN, "imatrix.gguf", "--imatrix", "imatrix.gguf"), "imatrix.gguf"),
    "sweep onto a picture": Case((*SWEEP, "holiday.png"), "holiday.png", write("holiday.png", "\x89PNG")),
    "sweep beside the configuration": Case((*SWEEP, "model/config.png"), "model/config.json"),
    # Importance.
    "imatrix onto its scores": Case((*IMATRIX, "model/model.acip"), "model.acip"),
    "imatrix onto its scores without --force": Case((*IMATRIX[:-2], "-o", "model/model.acip"), "model.acip"),
    "imatrix onto its scores' other name": Case((*IMATRIX, "s"), "s", hard_link("s", "model/model.acip")),
    "imatrix onto a model": Case((*IMATRIX, "export/model.gguf"), "export/model.gguf"),
    "imatrix onto one of llama-imatrix": Case((*IMATRIX, "theirs.gguf"), "theirs.gguf", _measured_elsewhere),
    # The check.
    "junit onto the model": Case((*CHECK, "--junit", "check/m.gguf"), "m.gguf"),
    "junit onto the configuration": Case((*CHECK, "--junit", "check/acip-check.toml"), "acip-check.toml"),
    "junit onto other XML": Case((*CHECK, "--junit", "x.xml"), "x.xml", write("x.xml", "<testsuites/>")),
    "junit onto a folder": Case((*CHECK, "--junit", "folder"), "folder"),
    "markdown onto the model": Case((*CHECK, "--markdown", "check/m.gguf"), "m.gguf"),
    "markdown onto the configuration": Case((*CHECK, "--markdown", "check/acip-check.toml"), "acip-check.toml"),
    "markdown onto the readme": Case((*CHECK, "--markdown", "README.md"), "README.md", write("README.md", "# Mine\n")),
    "markdown and junit in one": Case((*CHECK, "--markdown", "one", "--junit", "one"), "one"),
    "a lock that is something else": Case(
        (*CHECK, "--update"), "acip-check.lock.json", write("check/acip-check.lock.json", '{"locked": true}')
    ),
    "a lock that is a link to the model": Case(
        (*CHECK, "--update"), "m.gguf", link("check/acip-check.lock.json", "m.gguf")
    ),
    # Papers that are written into an export without asking.
    "report onto the user's card": Case(REPORT, "export/README.md", write("export/README.md")),
    "report onto the user's page": Case(REPORT, "export/report.html", _verified),
    "report onto a link": Case(REPORT, "model/README.md", link("export/README.md", "../model/README.md")),
    "verify onto the user's card": Case(VERIFY, "export/README.md", write("export/README.md")),
    "verify onto another report.json": Case(VERIFY, "export/report.json", write("export/report.json", "{}")),
    "verify in the model": Case(
        ("verify", "model", "--bundle", "bundle"),
        "model/README.md",
        lambda p: shutil.copy(p / "plan.json", p / "model"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_and_nothing_touched(case: str, place: Path, run: Run) -> None:
    CASES[case].before(place)
    before = snapshot(place.parent)
    done = run(*CASES[case].arguments)
    assert done.code == 2, done.err + done.out
    # A long path is broken where the line ends.
    assert unspaced(CASES[case].says) in unspaced(done.err)
    assert done.out == ""
    assert snapshot(place.parent) == before


def test_refused_before_anything_is_read(place: Path, run: Run) -> None:
    for name in ("model/model.safetensors", "model/model.acip", "plan.json", "bundle/bundle.json"):
        (place / name).write_bytes(b"damaged")
    for arguments in ((*MAIN, "folder"), (*MATERIALIZE, "folder"), (*CONVERT, "folder"), (*IMATRIX, "text.txt")):
        assert run(*arguments).code == 2
        assert run(*arguments[:-1], "new").code == 3


def test_the_root_and_a_device() -> None:
    """Only asked for: nothing is written."""
    with pytest.raises(UsageError, match="is or contains the current directory"):
        claim_output(Path("/"), EXPORT_KIND, True)
    with pytest.raises(UsageError, match="is no directory"):
        claim_output(Path("/dev/null"), EXPORT_KIND, True)
    with pytest.raises(UsageError, match="is not a plan"):
        claim_output(Path("/dev/null"), PLAN_KIND, True)
    for impossible in ("x" * 300, "a\0b"):
        with pytest.raises(OutputError, match="cannot be written"):
            claim_output(Path(impossible), PLAN_KIND, True)


def test_an_input_that_no_file_can_be_is_no_matter_of_the_output(tmp_path: Path) -> None:
    """What reads it names it; the output is none that cannot be written."""
    for inputs in (("x" * 300,), ("x" * 300 + "/y",)):
        claim_output(tmp_path / "new.json", PLAN_KIND, inputs=inputs)


REPLACED = {
    "main": (*MAIN, "new"),
    "plan": (*PLAN, "new"),
    "sweep": (*SWEEP, "new.svg"),
    "picture": (*SWEEP, "new.png"),
    "materialize": (*MATERIALIZE, "new"),
    "convert": (*CONVERT, "new"),
    "rank": (*RANK, "-o", "new", "--log-json", "log.jsonl"),
    "imatrix": (*IMATRIX, "new"),
    "check": (*CHECK, "--update", "--junit", "new.xml", "--markdown", "new.md"),
    "verify": VERIFY,
    "report": REPORT,
}


@pytest.mark.parametrize("command", REPLACED)
def test_what_we_wrote_is_replaced(command: str, place: Path, run: Run) -> None:
    names: list[set[str]] = []
    for _ in range(2):
        done = run(*REPLACED[command])
        assert done.code == 0, done.err
        names.append(set(snapshot(place)))
    assert names[0] == names[1], "and nothing is left beside it"
    if "--force" in REPLACED[command]:
        without = [word for word in REPLACED[command] if word != "--force"]
        refused = run(*without)
        assert (refused.code, "add --force" in refused.err) == (2, True), refused.err


def test_a_verified_export_is_replaced(place: Path, run: Run) -> None:
    """Report, page and card are no more the user's than the weights are."""
    assert run(*VERIFY).code == 0
    assert (place / "export" / "README.md").is_file()
    done = run(*CONVERT, "export")
    assert done.code == 0, done.err
    assert not (place / "export" / "README.md").exists()


# A command that is killed where what it was writing would have become the file, or directory, of a name.
KILLED = """
import os, pathlib, signal, sys
from acip_export.__main__ import main

replace, name = pathlib.Path.replace, sys.argv.pop(1)

def killed(self, target):
    if pathlib.Path(target).name == name:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

pathlib.Path.replace = killed
main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a signal that nothing catches")
@pytest.mark.parametrize("paper", ["report.json", "report.html", "README.md"])
def test_what_a_killed_verification_left_is_no_part_of_the_export(paper: str, place: Path, run: Run) -> None:
    """The next one passes and removes it; whoever publishes or replaces the export is not told of it either."""
    process = subprocess.run(
        [sys.executable, "-P", "-c", KILLED, paper, *VERIFY],
        env=module_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    export = place / "export"
    left = {path.name for path in export.iterdir() if path.name.startswith(".")}
    assert f".{paper}.lock" in left and len(left) == 2
    shutil.copytree(export, place / "other")
    assert check_bytes(export, load_plan(export / PLAN_FILE)) == []
    done = run(*VERIFY)
    assert done.code == 0, done.err
    assert not [path for path in export.iterdir() if path.name.startswith(".")]
    replaced = run(*CONVERT, "other")
    assert replaced.code == 0, replaced.err
    assert not [path for path in (place / "other").iterdir() if path.name.startswith(".")]
    # What only looks like it is the user's.
    for name in (".report.json.mine.tmp", ".notes.txt.lock", ".notes.txt.01234567.tmp"):
        (export / name).write_text("the user's")
        refused = run(*CONVERT, "export")
        assert (refused.code, name in refused.err) == (2, True), refused.err
        assert run(*VERIFY).code == 6
        (export / name).unlink()


@pytest.mark.parametrize(
    "name", [".report.json.lock/notes.txt", ".report.json.01234567.tmp", ".report.json.01234567.old"]
)
def test_locks_are_files_and_what_would_become_a_file_lies_in_a_directory(name: str, place: Path) -> None:
    """Things of the other kind were the user's, and would have been removed with the export."""
    export = place / "export"
    (export / name).parent.mkdir(exist_ok=True)
    (export / name).write_text("the user's")
    with pytest.raises(UsageError, match=re.escape(name)):
        claim_output(export, EXPORT_KIND, force=True)
    assert check_bytes(export, load_plan(export / PLAN_FILE)) == [f"{name}: written, but not planned"]


def test_an_empty_directory_is_filled(place: Path, run: Run) -> None:
    (place / "new").mkdir()
    (place / "link").symlink_to("new")
    assert run("convert", "bundle", "-o", "link").code == 0
    assert (place / "link").is_symlink()
    assert (place / "new" / "model.gguf").is_file()


@pytest.mark.parametrize(("arguments", "old"), [((*CONVERT, "link"), "export"), ((*PLAN, "link"), "plan.json")])
def test_a_link_stays_and_its_target_is_replaced(arguments: tuple[str, ...], old: str, place: Path, run: Run) -> None:
    (place / "elsewhere").mkdir()
    shutil.move(place / old, place / "elsewhere")
    (place / "link").symlink_to(Path("elsewhere", old))
    before, number = snapshot(place), (place / "elsewhere" / old).stat().st_ino
    done = run(*arguments)
    assert done.code == 0, done.err
    assert snapshot(place).keys() == before.keys()
    assert (place / "link").readlink() == Path("elsewhere", old)
    assert (place / "elsewhere" / old).stat().st_ino != number


def test_a_merge_conflict_in_the_baseline(place: Path, run: Run) -> None:
    lock = place / "check" / "acip-check.lock.json"
    assert run(*CHECK, "--update").code == 0
    whole = lock.read_text()
    head, rest = whole.split("\n", 1)
    for conflict in (
        f"<<<<<<< HEAD\n{whole}=======\n{whole}>>>>>>> other\n",
        f"{head}\n<<<<<<< HEAD\n{rest}",
        whole.replace(' "entries"', '<<<<<<< HEAD\n "entries"'),
    ):
        lock.write_text(conflict)
        assert run(*CHECK, "--update").code == 0
        assert lock.read_text() == whole


def test_what_comes_while_we_work_is_kept(place: Path) -> None:
    """A ranking takes hours, and the place was free when it began."""
    output = claim_output(place / "new", EXPORT_KIND)
    with pytest.raises(UsageError, match=r"new/notes\.txt"), output.new_directory() as directory:
        (directory / "model.gguf").write_text("made")
        shutil.copytree(place / "folder", place / "new")
    assert (place / "new" / "notes.txt").read_text() == "of folder"
    output = claim_output(place / "new.json", PLAN_KIND, force=True)
    with pytest.raises(UsageError, match="is not a plan"), output.new_file() as file:
        file.write_text("made")
        (place / "new.json").write_text("theirs")
    assert (place / "new.json").read_text() == "theirs"
    assert not list(place.glob(".*"))


def test_what_was_there_comes_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of the two renames fails, as on a disk that is taken away."""
    before, rename = snapshot(place), Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match="it is as it was"), new_directory(place / "export") as directory:
        (directory / "new").write_text("made")
    assert snapshot(place) == before
