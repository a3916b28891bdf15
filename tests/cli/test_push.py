"""Exports on a hub: what is uploaded, what is refused, and every refusal of the hub as a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from acip_export.artifacts.names import MARK_FILE, REPORT_FILE, TUNED_FILE
from acip_export.artifacts.plan import load_plan
from acip_export.cli import main as cli
from acip_export.cli.tables.report import show_export
from tests.hub import OWNER, READER, WRITER, Hub
from tests.support import Run, make_model, make_scores

ROOT = Path(__file__).parents[2]
NAME = f"{OWNER}/small"
PAPERS = {"README.md", "plan.json", "report.json", "report.html"}


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that has passed, of a model with a licence and an origin that nobody knows."""
    place = tmp_path_factory.mktemp("a-private-place")
    model = make_model(place / "model", num_hidden_layers=1)
    make_scores(model)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    flags = ("--budget", "3MB", "--format", "gguf", "--types", "q8_0", "--context", "64", "--no-calibrate")
    command = [sys.executable, "-m", "acip_export", *flags, "-o", str(place / "export")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=model, env=environment, check=True, capture_output=True, timeout=300)
    return place / "export"


@pytest.fixture
def export(verified: Path, tmp_path: Path) -> Path:
    return shutil.copytree(verified, tmp_path / "export")


@pytest.fixture(autouse=True)
def sentences_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever width the terminal has that the tests run in."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, known to its client in this process; with a token that may write, and without chunk storage."""
    with Hub(tmp_path / "chunks") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield hub


def test_what_is_shown_is_what_is_uploaded(export: Path, run: Run, hub: Hub) -> None:
    """The real client, its regular and its large files, and nothing that the plan does not list."""
    (export / TUNED_FILE).write_bytes(b"mine")
    shown = run("push", export, NAME, "--base-model", "owner/base", "--dry-run", "--json")
    assert shown.code == 0, shown.err
    assert hub.asked == []
    planned = json.loads(shown.out)
    done = run("push", export, NAME, "--base-model", "owner/base", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made["url"] == f"{hub.url}/{NAME}" and made["repository"] == NAME and made["commit"]
    files = hub.repositories[NAME].branches["main"]
    assert {name: len(data) for name, data in files.items()} == planned["files"] == made["files"]
    assert sum(planned["files"].values()) == planned["bytes"]
    plan = load_plan(export / "plan.json")
    assert set(files) == {*plan.files, *PAPERS}
    assert [asked.split()[0] for asked in hub.asked if "/storage/" in asked] == ["PUT"]
    for name, data in files.items():
        if name != "README.md":
            assert data == (export / name).read_bytes()
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["base_model"] == "owner/base" and front["license"] == "apache-2.0"
    assert front["library_name"] == "gguf" and "gguf" in front["tags"]
    # Only what it was asked to say is new in the card.
    card = (export / "README.md").read_text()
    assert card.split("---\n", 2)[2] == files["README.md"].decode().split("---\n", 2)[2]
    # A second time everything is there: it is a commit of nothing new.
    assert run("push", export, NAME, "--base-model", "owner/base").code == 0
    assert [asked for asked in hub.asked if asked.startswith("PUT")] == [f"PUT /storage/{next(iter(hub.stored))}"]


def test_nothing_of_this_machine_is_published(export: Path, verified: Path, run: Run, hub: Hub) -> None:
    assert run("push", export, NAME, "--base-model", "owner/base").code == 0
    for name, data in hub.repositories[NAME].branches["main"].items():
        for private in (verified.parent, ROOT, export):
            assert str(private).encode() not in data, name


def test_proposals_branches_and_private_repositories(export: Path, run: Run, hub: Hub) -> None:
    common = ("--base-model", "none", "--json")
    assert run("push", export, "small", "--private", *common).code == 0
    assert hub.repositories[NAME].private
    # Of a name alone the hub knows the owner.
    proposed = run("push", export, NAME, "--create-pr", *common)
    assert json.loads(proposed.out)["pull_request"] == f"{hub.url}/{NAME}/discussions/1"
    branched = run("push", export, NAME, "--revision", "3MB", *common)
    assert json.loads(branched.out)["url"] == f"{hub.url}/{NAME}/tree/3MB"
    assert set(hub.repositories[NAME].branches) == {"main", "refs/pr/1", "3MB"}
    assert "base_model" not in hub.repositories[NAME].branches["3MB"]["README.md"].decode().split("---\n")[1]
    hub.repositories[NAME].private = False
    refused = run("push", export, NAME, "--private", "--base-model", "none")
    assert refused.code == 2
    assert "everybody can see it" in refused.err and f"{hub.url}/{NAME}/settings" in refused.err


def test_through_chunk_storage(export: Path, hub: Hub, tmp_path: Path) -> None:
    """As most people upload: Xet's own client, which leaves its chunks in a directory here."""
    pytest.importorskip("hf_xet")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": WRITER,
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-m", "acip_export", "push", str(export), NAME, "--base-model", "none", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (large,) = load_plan(export / "plan.json").files
    stored = hub.repositories[NAME].branches["main"][large]
    assert stored.decode() == hashlib.sha256((export / large).read_bytes()).hexdigest()
    assert sum(file.stat().st_size for file in hub.cas.rglob("*") if file.is_file()) > 1_000_000


def test_what_was_not_verified_is_refused(export: Path, run: Run, hub: Hub) -> None:
    common = (NAME, "--base-model", "none")
    first = "acip-export: this export is not verified.\n\n"
    (export / MARK_FILE).write_text(f"{first}Verify it with:  acip-export verify X\n")
    refused = run("push", export, *common)
    assert refused.code == 6
    assert "marked as unverified\nVerify it with:  acip-export verify X\n" in refused.err
    assert "--unverified" in refused.err
    (export / MARK_FILE).write_text(f"{first}KL from the bundle is 3\n")
    refused = run("push", export, *common)
    assert refused.code == 6 and "KL from the bundle is 3" in refused.err
    assert f"acip-export verify {export}" in refused.err
    assert hub.asked == []
    assert run("push", export, *common, "--unverified").code == 0
    assert MARK_FILE not in hub.repositories[NAME].branches["main"]
    (export / MARK_FILE).unlink()
    assert run("push", export, *common).code == 0
    report = export / REPORT_FILE
    whole = report.read_text()
    report.write_text(whole.replace('"passed": true', '"passed": false'))
    assert "failed its verification" in run("push", export, *common).err
    report.unlink()
    assert "never verified" in run("push", export, *common).err
    report.write_text(whole)
    # Of the planned length, and other numbers.
    (name,) = load_plan(export / "plan.json").files
    data = bytearray((export / name).read_bytes())
    data[-1] ^= 1
    (export / name).write_bytes(data)
    changed = run("push", export, *common)
    assert changed.code == 6 and "not the file that was verified" in changed.err
    (export / name).write_bytes(data + b"x")
    changed = run("push", export, *common, "--unverified")
    assert changed.code == 6 and "is not what was planned" in changed.err
    (export / name).write_bytes(data)
    (export / "mine.txt").write_text("mine")
    assert "mine.txt: written, but not planned" in run("push", export, *common).err


def test_the_printed_line_has_what_the_card_lacks(
    export: Path, run: Run, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """With names in place of its own, it publishes; a card that says all needs no flag."""

    def printed() -> list[str]:
        show_export(load_plan(export / "plan.json"), export)
        return capsys.readouterr().out.replace("\\\n   ", "").splitlines()[-2:]

    says, line = printed()
    assert says == "Publish it, with its model card, which does not say  --base-model:"
    assert line.endswith(" --base-model OWNER/NAME") and "--license" not in line
    assert run(*shlex.split(line)[1:], "--dry-run").code == 0
    card = export / "README.md"
    whole = card.read_text()
    card.write_text(whole.replace('license: "apache-2.0"\n', ""))
    assert run(*shlex.split(printed()[1])[1:], "--dry-run").code == 0
    card.write_text(re.sub("base_model: .*", "base_model: owner/base", whole))
    assert printed()[0] == "Publish it, with its model card:"
    assert run(*shlex.split(printed()[1])[1:], "--dry-run").code == 0
    assert hub.asked == []


def test_cards_that_the_hub_could_not_use(export: Path, run: Run, hub: Hub) -> None:
    refused = run("push", export, NAME, "--dry-run")
    assert refused.code == 3
    assert "--base-model OWNER/NAME" in refused.err
    card = export / "README.md"
    whole = card.read_text()
    card.write_text(whole.replace('license: "apache-2.0"\n', ""))
    refused = run("push", export, NAME, "--base-model", "none", "--dry-run")
    assert refused.code == 3 and "--license apache-2.0" in refused.err
    assert run("push", export, NAME, "--base-model", "none", "--license", "mit", "--dry-run").code == 0
    card.write_text("# Mine\n")
    assert "front matter" in run("push", export, NAME, "--dry-run").err
    card.write_text("---\na: [\n---\n")
    assert "cannot be read" in run("push", export, NAME, "--dry-run").err
    card.unlink()
    refused = run("push", export, NAME, "--dry-run")
    assert refused.code == 3 and f"acip-export report {export}" in refused.err
    card.write_text(whole)
    hub.card_problem = '"license" must be one of a list'
    refused = run("push", export, NAME, "--base-model", "none", "--license", "mine")
    assert refused.code == 3 and hub.card_problem in refused.err
    assert hub.stored == {}


@pytest.mark.parametrize("name", ["", "a/b/c", "-x", "a--b", "a b", "x.git", "größe", "../x"])
def test_names_that_no_repository_has(export: Path, run: Run, hub: Hub, name: str) -> None:
    refused = run("push", export, "--base-model", "none", "--dry-run", "--", name)
    assert refused.code == 2
    assert "no name of a repository" in refused.err and "OWNER/NAME" in refused.err
    assert hub.asked == []


def test_refusals_of_the_hub(export: Path, run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*flags: str, name: str = NAME) -> str:
        done = run("push", export, name, "--base-model", "none", "--json", *flags)
        error = json.loads(done.out)
        assert (done.code, error["code"], error["kind"]) == (2, 2, "HubError")
        return str(error["error"])

    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        assert "no token" in (said := refused()) and "hf auth login" in said and f"{hub.url}/settings/tokens" in said
        assert hub.asked == []
        patch.setenv("HF_TOKEN", "hf_of_last_year")
        assert "does not accept the token" in (said := refused()) and "hf auth login" in said
        assert "hf_of_last_year" not in said
        patch.setenv("HF_TOKEN", READER)
        assert "may not write" in (said := refused()) and "--create-pr" in said
    assert "somebody-else" in (said := refused(name="somebody-else/x")) and "may not write" in said
    assert run("push", export, NAME, "--base-model", "none").code == 0
    hub.broken = "/commit/"
    with monkeypatch.context() as patch:
        # Its own patience would be a minute.
        patch.setattr("time.sleep", lambda _seconds: None)
        assert "cannot be reached" in refused("--revision", "other")
    hub.broken = "/nothing"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in refused()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in refused()


def test_the_command_hides_no_bars_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    from acip_export.io import hub

    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    hub.show_bars()  # of commands before
    monkeypatch.setenv(name, "0")
    hub.hide_bars()
    hub.show_bars()
    assert os.environ[name] == "0"
    monkeypatch.delenv(name)
    hub.hide_bars()
    assert os.environ[name] == "1"
    hub.show_bars()
    assert name not in os.environ
    assert vars(cli)["hide_bars"] is hub.hide_bars
