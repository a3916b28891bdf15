"""What people see: lines of 80 columns, nothing cut off, errors that a program can read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from acip_export.artifacts.plan import FAR_OFF, load_plan
from acip_export.artifacts.scores import load_scores, save_scores
from acip_export.cli import output
from acip_export.cli.main import app
from acip_export.errors import MissingExtraError, UsageError
from acip_export.formats.registry import export_format
from tests.cli.conftest import truncated_scores
from tests.support import Run, unspaced

ASKED = ("--budget", "3MB", "--format", "gguf", "--context", "64")
COMMANDS = tuple(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(output, "out", output.Results(width=80))
    monkeypatch.setattr(output, "err", output.Diagnostics(width=80, stderr=True))


def assert_fits(text: str) -> None:
    assert text.strip()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    assert "…" not in text


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits(command: str, run: Run) -> None:
    done = run(*([command] if command else []), "--help")
    assert done.code == 0, done.err
    assert_fits(done.out)


def test_the_first_screen(run: Run) -> None:
    """Commands first, then flags under headings, on a screen and a half."""
    shown = run("-h").out.splitlines()
    assert len(shown) <= 77
    headings = [line.split(" ─")[0] for line in shown if "───" in line]
    assert headings == ["Commands", "Target", "Budget", "Model", "Output", "Check", "GGUF", "ONNX", "More"]
    assert run().out.splitlines() == shown


@pytest.mark.slow
def test_tables_fit(model: Path, run: Run) -> None:
    text = model / "text.txt"
    text.write_text("def main(argv: list[str]) -> int:\n    return sum(int(a) for a in argv[1:]) or 12345\n\n" * 20)
    made = run(*ASKED, "--text", "text.txt", "-o", "out")
    assert made.code == 0, made.err
    assert_fits(made.out)
    assert "perplexity" in made.out and "(dense" in made.out
    told = unspaced(made.out)
    assert unspaced("from the dense model: KL") in told and unspaced("agreement with the bundle: KL") in told
    assert "\nacip-export push " in made.out
    compared = json.loads(run("inspect", ".", "out", "--json").out)
    changed = {change["name"]: change for change in compared["changes"]}
    # One name for both, the model's.
    assert changed["model.embed_tokens.weight"]["before"]["nbytes"]
    assert changed["model.embed_tokens.weight"]["after"]["nbytes"]
    (model / "acip-check.toml").write_text(
        '[[check]]\nname = "a-model-with-a-long-name-of-its-own"\npath = "out"\nmax_growth = "1%"\n'
    )
    for arguments in (
        ("plan", *ASKED, "-v"),
        ("plan", "--budget", "2500kB", "--format", "onnx", "--context", "64"),
        ("verify", "out"),
        ("inspect", "out"),
        ("inspect", ".", "out"),
        ("check", "--update"),
        ("check",),
        ("devices",),
        ("devices", "this"),
        ("devices", "pixel-9-12gb"),
        ("formats",),
        ("formats", "--all"),
        ("formats", "ONNX"),
    ):
        done = run(*arguments)
        assert done.code == 0, (arguments, done.err)
        assert_fits(done.out)


def test_formats_are_a_screen(run: Run) -> None:
    """And whole where it is asked for."""
    first = run("formats").out
    assert_fits(first)
    assert len(first.splitlines()) <= 40
    whole = run("formats", "--all").out
    (one, other), known = (
        (run("formats", name).out for name in ("gguf", "onnx")),
        json.loads(run("formats", "--json").out),
    )
    assert whole == one + other
    backend_flags = known["onnx"]["backends"]
    assert backend_flags[0] == "cpu" and not known["gguf"]["backends"]
    for backend in backend_flags:
        assert set(export_format("onnx", backend).cache_types) <= set(re.findall(r"\w+", first))
        assert f"backend {backend}: " in whole
    for found in known.values():
        for name in (
            *found["layouts"],
            *found["runtimes"],
            *found["backends"],
            *found["cache_types"],
            *found["options"],
        ):
            assert name in first, name
        for each in found["types"]:
            assert f"\n {each['name']} " in whole
    by_default = [line.split()[0] for line in whole.splitlines() if line.endswith(" default")]
    assert len(by_default) > 10 and all(name in first for name in by_default)


def test_blanks_go_before_line_breaks_alone(capsys: pytest.CaptureFixture[str]) -> None:
    output.out.print("a ", end="")
    output.out.print("b  \n\n  c ", style="bold")
    output.say("d", indent=2)
    output.print_error(UsageError("e \nf "))
    printed = capsys.readouterr()
    assert printed.out == "a b\n\n  c\n  d\n"
    assert printed.err == "error: e\nf\n"


def test_messages_are_folded_at_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line with what stands before it; in a log nothing is, so that it can be searched and copied."""
    sentence = "a sentence of several words, " * 6

    def told() -> str:
        output.print_error(UsageError(f"{sentence}\n  {sentence}"))
        output.note(sentence)
        return capsys.readouterr().err

    folded = told()
    assert_fits(folded)
    assert unspaced(folded) == unspaced(f"error: {sentence * 3}")
    assert [line[:2] for line in folded.splitlines()].count("  ") == 3, folded
    monkeypatch.delenv("COLUMNS")
    assert [line.rstrip() for line in told().splitlines()] == [
        f"error: {sentence}".rstrip(),
        f"  {sentence}".rstrip(),
        sentence.rstrip(),
    ]


def test_where_nobody_looks_sentences_stay_whole(model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In logs a path that is broken at a column could not be searched for."""
    monkeypatch.delenv("COLUMNS")
    place = model / ("long-" * 12) / ("name-" * 12)
    done = run(*ASKED, "--no-verify", "-o", place)
    assert done.code == 0, done.err
    assert f"in {place}, as planned" in done.out


def _far_off(model: Path) -> None:
    """A model whose predicted loss is large at small sizes."""
    file = next(model.glob("*.acip"))
    scores, heavier = load_scores(file), 100
    losses = ("drop_loss", "sensitivity", "up_sensitivity", "down_sensitivity")
    modules = {
        name: dataclasses.replace(module, **{loss: heavier * getattr(module, loss) for loss in losses})
        for name, module in scores.modules.items()
    }
    dense = scores.curve[0].loss
    curve = tuple(dataclasses.replace(at, loss=dense + heavier * (at.loss - dense)) for at in scores.curve)
    save_scores(dataclasses.replace(scores, modules=modules, curve=curve), file, force=True)


def test_a_plan_that_is_far_off_says_so_first(model: Path, run: Run) -> None:
    _far_off(model)
    asked = ("--budget", "1MB", "--format", "gguf", "--context", "64")
    planned = run("plan", *asked)
    assert planned.code == 0, planned.err
    assert_fits(planned.out)
    assert "times the dense model's" in planned.out.splitlines()[0]
    assert "--accept-loss" in planned.out
    document = json.loads(run("plan", *asked, "--json").out)
    assert any("times the dense model's" in note for note in document["notes"])
    mending = document["certificate"]["alternatives"][-1]
    assert mending["change"].startswith("--budget ")
    again = run("plan", "--format", "gguf", "--context", "64", *mending["change"].split())
    assert "times the dense" not in again.out


def test_a_loss_has_to_be_accepted(model: Path, run: Run) -> None:
    _far_off(model)
    asked = ("--budget", "1MB", "--format", "gguf", "--context", "64", "--no-verify", "-o", "out")
    refused = run(*asked)
    assert refused.code == 4
    assert f"more than {FAR_OFF:g} times" in " ".join(refused.err.split())
    assert "--accept-loss" in refused.err and not Path("out").exists()
    assert refused.out == ""
    error = json.loads(run(*asked, "--json").out)
    assert error["code"] == 4 and error["kind"] == "UnacceptedLossError"
    assert all(each["change"].startswith("--") and each["predicted_perplexity"] for each in error["alternatives"])
    assert run(*asked, "--dry-run").code == 0
    accepted = run(*asked, "--accept-loss")
    assert accepted.code == 0, accepted.err
    assert Path("out").is_dir()


def _nothing(_model: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("harm", "arguments", "code", "kind"),
    [
        (_nothing, ("--colour",), 2, "UsageError"),
        (_nothing, ("--context", "many"), 2, "UsageError"),
        (_nothing, ("no-such-command",), 2, "UsageError"),
        (_nothing, ("--budget", "4"), 2, "UsageError"),
        (truncated_scores, (), 3, "ScoreFileError"),
        (_nothing, ("--types", "int4"), 5, "UnsupportedError"),
    ],
)
def test_errors_as_json(
    harm: Callable[[Path], None], arguments: tuple[str, ...], code: int, kind: str, model: Path, run: Run
) -> None:
    harm(model)
    own = () if "--budget" in arguments else ("--budget", "3MB")
    done = run(*own, "--format", "gguf", "--json", *arguments)
    assert done.code == code
    error = json.loads(done.out)
    assert (error["code"], error["kind"]) == (code, kind)
    assert error["error"] and done.err == ""


@pytest.mark.usefixtures("model")
def test_an_infeasible_budget_as_json(run: Run) -> None:
    asked = ("--format", "gguf", "--context", "256", "--json")
    floor = json.loads(run("--budget", "1kB", *asked).out)["floor_bytes"]
    done = run("--budget", f"{floor - 1}B", *asked)
    assert done.code == 4
    error = json.loads(done.out)
    assert error["floor_bytes"] == floor
    assert error["alternatives"]
    for each in error["alternatives"]:
        assert each["floor_bytes"] < floor
        assert each["change"] in error["error"]
    assert MissingExtraError("gguf", "gguf", "this").to_json()["code"] == 7


def test_a_failed_check_is_one_document(model: Path, run: Run) -> None:
    (model / "acip-check.toml").write_text('[[check]]\nname = "m"\npath = "model.safetensors"\nmax_bytes = "1kB"\n')
    done = run("check", "--json")
    assert done.code == 6, done.err
    json.loads(done.out)
    assert "error:" in done.err


@pytest.mark.usefixtures("model")
def test_flags_given_twice_or_elsewhere(run: Run) -> None:
    twice = run(*ASKED, "--context", "32")
    assert twice.code == 2
    assert "--context is given 2 times" in twice.err
    assert run("plan", "-f", "gguf", "--format", "onnx", "--budget", "3MB").code == 2
    assert run("plan", *ASKED, "-q", "-q").code == 0
    before = run("--budget", "3MB", "plan", "--format", "gguf")
    assert before.code == 2
    assert unspaced("acip-export plan --budget") in unspaced(before.err)
    assert run("-q", "devices").code == 0


def test_forgiving_spellings(model: Path, run: Run) -> None:
    dense = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    shared = ("plan", "--context", "64", "--json")
    half = json.loads(run(*shared, "--format", "GGUF", "--budget", "150%").out)
    assert half["format"] == "gguf"
    assert 0.98 * dense < half["budget_bytes"] / 1.5 <= dense
    assert json.loads(run(*shared, "--format", "gguf", "--budget", "3m").out)["budget_bytes"] == 3_000_000


@pytest.mark.usefixtures("model")
def test_names_of_exports_carry_their_size(run: Run) -> None:
    done = run("--budget", "2500kB", "--format", "onnx", "--context", "64", "--no-verify")
    assert done.code == 0, done.err
    assert [place.name for place in Path("export").iterdir()] == ["onnx-2.5MB"]


@pytest.mark.usefixtures("model")
def test_this_machine_is_a_device(run: Run) -> None:
    device = json.loads(run("devices", "this", "--json").out)
    assert 0 < device["budget_bytes"] < device["memory_bytes"]
    planned = run("plan", "--device", "this", "--context", "64", "--json")
    assert planned.code == 0, planned.err
    plan = json.loads(planned.out)
    assert (plan["device"], plan["budget_scope"], plan["budget_bytes"]) == ("this", "process", device["budget_bytes"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("acip-export pl", {"plan"}),
        ("acip-export plan --format o", {"onnx"}),
        ("acip-export --device raspberry-pi-5-1", {"raspberry-pi-5-16gb"}),
        ("acip-export plan --accept", set()),
        ("acip-export --accept", {"--accept-loss"}),
    ],
)
def test_the_shell_completes(words: str, expected: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "acip_export"],
        env={
            **os.environ,
            "_ACIP_EXPORT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(done.stdout.split()) == expected, done.stderr


DEVICE = """
[[device]]
name = "{name}"
title = "A device"
class = "board"
memory = "{memory}"
usable = 0.5
runtimes = {{ gguf = "llama.cpp" }}
types.gguf = ["f16"]
{more}
source = {{ memory = "data sheet", usable = "measured", types = "benchmark" }}
"""


def test_a_device_says_which_types_it_limits_plans_to(run: Run) -> None:
    """And which types of a plan without it are left out."""
    shown = run("devices", "raspberry-pi-5-8gb")
    assert_fits(shown.out)
    told = unspaced(shown.out)
    allowed = json.loads(run("devices", "raspberry-pi-5-8gb", "--json").out)["types"]["gguf"]
    left_out = [name for name in export_format("gguf").types if name not in allowed]
    assert left_out
    assert unspaced(f"only types that are fast there: {', '.join(allowed)}; not {', '.join(left_out)}, unless") in told
    assert "only types" not in run("devices", "this").out


@pytest.mark.usefixtures("model")
def test_devices_that_hold_an_export(run: Run) -> None:
    """The budget that just takes the process is held, one byte less of it is not."""
    assert run("plan", *ASKED, "--types", "f16,q8_0", "-o", "plan.json").code == 0
    plan = load_plan("plan.json")
    exact, needed = 2 * plan.process_bytes, plan.process_bytes
    Path("mine.toml").write_text(
        DEVICE.format(name="a-board-whose-name-is-long-16gb", memory=f"{exact}B", more="")
        + DEVICE.format(name="small", memory=f"{exact - 2}B", more="")
        + DEVICE.format(name="floppy", memory="8GB", more='largest_file = "1kB"')
    )
    shown = run("devices", "--fits", "plan.json", "--devices", "mine.toml")
    assert shown.code == 0, shown.err
    assert_fits(shown.out)
    assert f"{needed:,} bytes planned" in shown.out
    assert "a-board-whose-name-is-long-16gb" in shown.out and "small" not in shown.out
    listed = json.loads(run("devices", "--fits", "plan.json", "--devices", "mine.toml", "--json").out)
    held = {each["name"]: each for each in listed["devices"]}
    assert held["a-board-whose-name-is-long-16gb"]["budget_bytes"] == needed == listed["process_bytes"]
    used = {tensor.type for tensor in plan.tensors if len(tensor.shape) == 2}
    assert held["a-board-whose-name-is-long-16gb"]["slow_types"] == sorted(used - {"f16", None})
    assert listed["others"]["small"] == "less memory"
    assert listed["others"]["floppy"] == "no file as large"


@pytest.mark.usefixtures("model")
def test_a_name_beside_fits_is_a_contradiction(run: Run) -> None:
    assert run("devices", "browser", "--fits", "plan.json").code == 2


@pytest.mark.usefixtures("model")
def test_devices_whose_runtime_cannot(run: Run) -> None:
    asked = ("--budget", "3MB", "--format", "onnx", "--context", "64")
    for batch, held in (("16", False), ("64", True)):
        assert run("plan", *asked, "--prompt-batch", batch, "-o", "plan.json", "--force").code == 0
        listed = json.loads(run("devices", "--fits", "plan.json", "--json").out)
        assert (listed["others"].get("browser") is None) == held, listed["others"]
        assert "pixel-9-12gb" in {each["name"] for each in listed["devices"]}
    rounded = ("--prompt-batch", "64", "--cache-type", "int8", "-o", "plan.json", "--force")
    assert run("plan", *asked, *rounded).code == 0
    listed = json.loads(run("devices", "--fits", "plan.json", "--json").out)
    assert listed["others"]["browser"] == "no KV cache of int8"


def test_warnings_are_sentences_whatever_libraries_configure() -> None:
    program = (
        "import logging\n"
        "from acip_export.cli import output\n"
        "output.print_warnings()\n"
        "logging.basicConfig(format='%(asctime)s %(name)s [%(levelname)s] - %(message)s')\n"
        "for quiet in (False, True):\n"
        "    output.be_quiet(quiet)\n"
        "    logging.getLogger('acip_export.api').warning('planned again, for %s', '[316 MB]')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == 2 * "planned again, for [316 MB]\n"
