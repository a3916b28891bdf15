"""``acip-export.toml``: named exports are the main job with the options of a table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer

from acip_export.cli.main import app
from acip_export.cli.project import PROJECT_FILE, load_project
from acip_export.errors import UsageError
from tests.api.conftest import ranked_sample as ranked_sample
from tests.support import Run

DOCS = Path(__file__).parents[2] / "docs" / "project-file.md"
PHONE = """
[export.phone]
model = "model"
format = "gguf"
budget = "5MB"
context = 128
types = ["q8_0", "q4_0"]
calibrate = false
accept-loss = true
verify = false
"""
SIZES = """
[export.sizes]
model = "model"
format = "gguf"
budget = ["4MB", "5MB"]
context = "128"
types = "q8_0,q4_0"
calibrate = false
accept-loss = true
verify = false
out = "dist/sizes"
"""


@pytest.fixture
def project(ranked_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the sample model and a project file of two exports."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(ranked_sample)
    (tmp_path / PROJECT_FILE).write_text(PHONE + SIZES)
    return tmp_path


def test_a_name_is_the_main_job(project: Path, run: Run) -> None:
    done = run("build", "phone", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)["phone"]
    assert (made["out"], made["plan"]["serving"]["context"], made["report"]) == ("export/phone", 128, None)
    by_hand = run(
        *("-m", "model", "-f", "gguf", "--budget", "5MB", "--context", "128", "--types", "q8_0,q4_0"),
        *("--no-calibrate", "--accept-loss", "--no-verify", "-o", "by-hand"),
    )
    assert by_hand.code == 0, by_hand.err
    one, other = (project / each / "model.gguf" for each in ("export/phone", "by-hand"))
    assert one.read_bytes() == other.read_bytes()
    assert "--force" in run("build", "phone").err


def test_all_of_them_from_another_directory(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    file = Path("..") / PROJECT_FILE
    done = run("build", "--config", file)
    assert done.code == 0, done.err
    assert {each.name for each in (project / "dist/sizes").iterdir()} == {"gguf-4MB", "gguf-5MB", "comparison.html"}
    assert (project / "export/phone/plan.json").is_file()
    assert not any(elsewhere.iterdir()) and Path.cwd() == elsewhere
    # The second of two that stands in the way is found before the first is made.
    shutil.rmtree(project / "export")
    refused = run("build", "--config", file)
    assert refused.code == 2
    assert f"{file}: $.export.sizes: " in refused.err
    assert not (project / "export").exists()


def test_list_and_dry_run_write_nothing(project: Path, run: Run) -> None:
    before = sorted(project.rglob("*"))
    listed = run("build", "--list")
    assert "sizes: acip-export --format=gguf --types=q8_0,q4_0 --budget=4MB --budget=5MB" in listed.out
    command = json.loads(run("build", "--list", "--json").out)["phone"]
    planned = run("build", "--dry-run", "--json")
    assert planned.code == 0, planned.err
    plans = json.loads(planned.out)
    assert plans["phone"] == json.loads(run(*command[1:], "--dry-run", "--json").out)
    assert [each["budget_bytes"] for each in plans["sizes"]] == [4_000_000, 5_000_000]
    assert sorted(project.rglob("*")) == before


def _unwrapped(message: str) -> str:
    return " ".join(message.split())


def test_the_check_knows_the_names(project: Path, run: Run) -> None:
    config = project / "acip-check.toml"
    config.write_text('[[check]]\nexport = "phone"\nmax_bytes = "5MB"\n')
    missing = run("check")
    assert missing.code == 6 and "phone" in missing.err
    assert run("build", "phone").code == 0
    checked = run("check", "--json")
    assert checked.code == 0, checked.err
    (result,) = json.loads(checked.out)["results"]
    assert (result["name"], result["path"]) == ("phone", "export/phone")
    for name, says in {"sizes": 'by glob = "dist/sizes/*-*"', "phnoe": "did you mean phone?"}.items():
        config.write_text(f'[[check]]\nexport = "{name}"\nmax_bytes = "5MB"\n')
        refused = run("check")
        assert refused.code == 2 and says in _unwrapped(refused.err), refused.err


def test_errors_of_the_job_name_the_export(project: Path, run: Run) -> None:
    (project / PROJECT_FILE).write_text(PHONE.replace("5MB", "5kB"))
    done = run("build", "--json")
    assert done.code == 4
    error = json.loads(done.out)
    assert error["error"].startswith("acip-export.toml: $.export.phone: ")
    assert error["floor_bytes"] > 5000


TABLE = '[export.phone]\nformat = "gguf"\nbudget = "5MB"\n'
BAD = {
    "not toml": ("[export", "TOML"),
    "empty": ("", "missing required field export"),
    "no exports": ("[export]", "has no exports"),
    "not a table": ('export = "phone"', "$.export: expected object"),
    "other table": (TABLE + "[exports.board]", "unknown field exports"),
    "typo": (TABLE + 'budgett = "5MB"', "did you mean budget?"),
    "underscore": (TABLE + 'cache_type = "f16"', "did you mean cache-type?"),
    "of the call": (TABLE + "force = true", "unknown field force"),
    "twice": (TABLE + 'budget = "4MB"', "TOML"),
    "number for text": (TABLE.replace('"gguf"', "3"), "$.export[...].format: expected str"),
    "bare number": (TABLE.replace('"5MB"', "5"), "budget: expected"),
    "no unit": (TABLE.replace("5MB", "5"), "$.export.phone: budget '5' has no unit"),
    "text for truth": (TABLE + 'verify = "no"', "verify: expected bool"),
    "truth for number": (TABLE + "candidates = true", "candidates: expected int"),
    "not a choice": (TABLE + 'budget-scope = "all"', "invalid enum value 'all'"),
    "not a number": (TABLE + "max-loss = nan", "max-loss: expected float"),
    "huge number": (TABLE + f"context = {10**30}", "context: expected"),
    "out of range": (TABLE + "candidates = 99", "$.export.phone: Invalid value for '--candidates'"),
    "no format": ('[export.phone]\nbudget = "5MB"', "$.export.phone: no format"),
    "nothing asked": ('[export.phone]\nmodel = "m"', "$.export.phone: no format"),
    "contradiction": (TABLE + 'context = 64\nmax-loss = 0.1\ndevice = "nothing"', "$.export.phone: unknown device"),
    "companion of another format": (TABLE + "ort = true", "$.export.phone: --ort goes with"),
    "a value like a flag": (TABLE + 'model = "model"\nlayout = "--force"', "$.export.phone: "),
    "empty list": (TABLE + "types = []", "types: expected"),
    "absolute": (TABLE + 'out = "/tmp/x"', "$.export.phone.out"),
    "above": (TABLE + 'scores = "a/../../x.acip"', "$.export.phone.scores"),
    "above on Windows": (TABLE + 'cache = "..\\\\x"', "$.export.phone.cache"),
    "drive": (TABLE + 'model = "C:x"', "$.export.phone.model"),
    "home": (TABLE + 'text = "~/x"', "$.export.phone.text"),
    "of a format": (TABLE + 'imatrix = "/x"', "$.export.phone.imatrix"),
    "steers terminals": (TABLE + 'layout = "\\u001b[2J"', "must be printable"),
    "name is a path": (TABLE.replace("phone", '"../phone"'), "expected str matching regex"),
    "one place": (TABLE + TABLE.replace("phone", "board") + 'out = "export/phone"', "where phone goes, too"),
    "place in a place": (TABLE + TABLE.replace("phone", "board") + 'out = "export/phone/b"', "where phone goes, too"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_project_files(case: str, project: Path, run: Run) -> None:
    text, says = BAD[case]
    (project / PROJECT_FILE).write_text(text)
    done = run("build", "--force")
    assert done.code in (2, 5), done.err
    assert PROJECT_FILE in done.err and says in _unwrapped(done.err), done.err
    assert not (project / "export").exists()


def test_names_and_files_that_are_not_there(project: Path, run: Run) -> None:
    assert "did you mean phone?" in run("build", "phon").err
    assert "it has: phone, sizes" in run("build", "zzz").err
    assert "given 2 times" in run("build", "phone", "phone").err
    (project / PROJECT_FILE).unlink()
    assert "[export.phone]" in run("build").err
    (project / PROJECT_FILE).write_bytes(b"\xff\xfe")
    assert "UTF-8" in run("build").err


def test_every_flag_is_a_key_or_of_the_call(tmp_path: Path) -> None:
    """A new flag of the main job is a key without a line of code, and build takes the others."""
    group = typer.main.get_command(app)
    file = tmp_path / PROJECT_FILE
    file.write_text(TABLE)
    load_project(file, group)
    of_the_call = {p.name for p in group.commands["build"].params}  # type: ignore[attr-defined]
    for parameter in group.params:
        file.write_text(f"[export.phone]\n{parameter.opts[0].removeprefix('--')} = {{}}\n")
        of_the_file = parameter.name not in of_the_call and parameter.expose_value and not parameter.is_eager
        of_the_file &= not getattr(parameter, "hidden", False)
        with pytest.raises(UsageError, match="expected" if of_the_file else "unknown field"):
            load_project(file, group)
    assert {"dry_run", "json", "force", "verbose"} <= of_the_call
    assert PROJECT_FILE in DOCS.read_text(encoding="utf-8")
