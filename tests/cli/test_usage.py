"""What is typed wrongly: the message says what was found, what is taken, and what to type next."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from acip_export.choices import instead_of, nearest
from acip_export.cli.main import app
from tests.support import Run, unspaced

GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("typed", "write"),
    [
        ("plan .", "--model ."),
        (". --budget 3MB", "--model ."),
        ("plan Qwen/Qwen2.5-0.5B --format gguf", "--model Qwen/Qwen2.5-0.5B"),
        ("plan tiny.acip", "--scores tiny.acip"),
        ("plan GGUF", "--format GGUF"),
        ("calibrate onnx", "--format onnx"),
        ("900MB", "--budget 900MB"),
        ("plan 50%", "--budget 50%"),
        ("plan raspberry-pi-5-8gb", "--device raspberry-pi-5-8gb"),
        ("check other.toml", "--config other.toml"),
        ("rank . config.json", "--data config.json"),
        ("verify export config.json", "--text config.json"),
        ("convert bundle elsewhere", "--out elsewhere"),
    ],
)
@pytest.mark.usefixtures("model")
def test_a_word_is_answered_with_its_flag(typed: str, write: str, run: Run) -> None:
    done = run(*typed.split())
    assert done.code == 2
    assert unspaced(f"; write {write}\n") in unspaced(done.err), done.err
    assert "extra argument" not in done.err


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("before", "end", "code", "says"),
    [
        ("plan", "", 2, "takes flags only"),
        ("--budget 3MB --format gguf --text", "", 3, "cannot be read"),
        ("--budget 3MB --format gguf --tasks", ".yaml", 2, "has no task"),
    ],
)
def test_words_too_long_for_the_name_of_a_file(before: str, end: str, code: int, says: str, run: Run) -> None:
    done = run(*before.split(), "x" * 5000 + end)
    assert done.code == code
    assert unspaced(says) in unspaced(done.err)


@pytest.mark.usefixtures("model")
def test_an_export_to_check_is_named_in_a_file(run: Run) -> None:
    done = run("check", "export/gguf-4GB")
    assert done.code == 2
    says = "takes flags only, and 'export/gguf-4GB' is none; what it works on is named in the file of --config"
    assert unspaced(says) in unspaced(done.err)
    assert "acip-check.toml" in done.err


def words_of(name: str) -> list[Any]:
    """Return the parameters of a command that are no flags."""
    return [p for p in COMMANDS[name].params if not p.opts[0].startswith("-")]


@pytest.mark.parametrize("name", [name for name in COMMANDS if all(p.nargs != -1 for p in words_of(name))])
def test_a_word_too_many_is_named_by_every_command(name: str, run: Run) -> None:
    """And the help that is named is the command's own; some take any number."""
    words = words_of(name)
    done = run(name, *("x" for _ in words), "one-more")
    assert done.code == 2
    assert "'one-more' is" in done.err and f"acip-export {name} -h  shows" in done.err
    assert run(name, *("x" for _ in words), "one-more", "-h").code == 0


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("verify", "verify needs EXPORT: an export directory"),
        ("push x", "needs REPOSITORY: OWNER/NAME on the hub"),
        ("plan --budget", "--budget needs a value"),
        ("plan --buget 3MB", "no flag --buget; did you mean --budget?"),
        ("plan --bud 3MB", "no flag --bud; did you mean --budget?"),
        ("rank --context 2x", "--context"),
    ],
)
def test_errors_of_the_parser_name_the_commands_own_help(typed: str, says: str, run: Run) -> None:
    done = run(*typed.split())
    assert done.code == 2
    assert unspaced(says) in unspaced(done.err), done.err
    assert f"acip-export {typed.split()[0]} -h  shows" in done.err


@pytest.mark.parametrize(
    ("typed", "then"),
    [
        ("rank . --budget 900MB", "acip-export --budget 900MB --format gguf"),
        ("rank --budget=50% .", "acip-export --budget 50% --format gguf"),
        ("rank . --data text.txt -f onnx", "acip-export --budget 4GB --format onnx"),
        ("rank . --device browser", "acip-export --device browser"),
        ("rank --budget --data text.txt", "acip-export --budget VALUE --format gguf"),
        ("rank . --no-verify", "acip-export --budget 4GB --format gguf --no-verify"),
    ],
)
def test_flags_of_the_export_at_the_ranking(typed: str, then: str, run: Run) -> None:
    done = run(*typed.split())
    assert done.code == 2
    assert "belongs to the export" in done.err and "serves every size" in done.err
    assert done.err.splitlines()[-1].strip() == then
    assert "belongs to the export" not in run("rank", "--version").err


def test_a_command_that_is_none(run: Run) -> None:
    assert "did you mean  acip-export plan?" in run("plna").err
    assert "acip-export -h  shows" in run("quantise").err


CHOICES = [
    (name, parameter.opts[0], match.group(1))
    for name, command in {"": GROUP, **COMMANDS}.items()
    for parameter in command.params
    if (match := re.match(r"typing.Literal\['([^']+)'", str(parameter.type_descriptor.annotation)))
]


@pytest.mark.parametrize(("command", "flag", "choice"), CHOICES)
def test_a_misspelt_choice_of_any_flag(command: str, flag: str, choice: str, run: Run) -> None:
    done = run(*command.split(), flag, f"{choice}x")
    assert done.code == 2
    assert unspaced(f"{flag} cannot be '{choice}x'; it can be:") in unspaced(done.err)
    assert unspaced(f"; did you mean {choice}?") in unspaced(done.err)
    assert "Value error" not in done.err


@pytest.mark.parametrize(
    ("typed", "close"),
    [
        ("plan --format ggfu --budget 3MB", "gguf"),
        ("formats ONX", "onnx"),
        ("calibrate --format onx", "onnx"),
        ("plan --format gguf --budget 3MB --types Q4K", "q4_k"),
        ("plan --format gguf --budget 3MB --cache-type q8-0x", "q8_0"),
        ("plan --format gguf --budget 3MB --layout loar", "lora"),
        ("plan --format onnx --budget 3MB --backend webgup", "webgpu"),
        ("plan --format onnx --budget 3MB --runtime onxruntime", "onnxruntime"),
        ("plan --device browsr", "browser"),
        ("rank --data x --set lerning_rate=1", "learning_rate"),
        ("cache ruonding", "rounding"),
    ],
)
def test_names_that_a_format_or_a_registry_knows(typed: str, close: str, model: Path, run: Run) -> None:
    shutil.copy(model / "config.json", model / "x")
    done = run(*typed.split())
    assert done.code in (2, 5)
    assert unspaced(f"did you mean {close}") in unspaced(done.err).replace("Did", "did"), done.err


def test_the_nearest_name() -> None:
    assert instead_of("fischer", ["fisher", "kfac"]) == "it has: fisher, kfac; did you mean fisher?"
    assert instead_of("x", ["fisher", "kfac"], "known") == "known: fisher, kfac"
    assert nearest("Q4_K_M", ["q4_0", "q4_k"]) == ["q4_k"]
    assert nearest("max_bytes", ["max-bytes", "max-loss"]) == ["max-bytes"]
    assert nearest("", ["a"]) == []
