"""Commands that are stopped, and commands whose output nobody can take: an exit code, no traceback, nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from acip_export.io.processes import module_environment
from acip_export.version import __version__
from tests.support import make_model, make_scores

COMMAND = [sys.executable, "-P", "-c", "from acip_export.__main__ import main; main()"]

# A command that leaves a thread behind in C code, and is stopped again while it tidies up.
STOPPED_TWICE = """
import os, signal, time
from concurrent.futures import ThreadPoolExecutor
from acip_export.cli import main as cli

def command(**_):
    ThreadPoolExecutor(1).submit(time.sleep, 600)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        print("tidied up")

cli.app = command
cli.main()
"""


# A command that is stopped while the process ends.
STOPPED_LATE = """
import atexit, os, signal, time
from acip_export.__main__ import main

def stop():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)

atexit.register(stop)
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_model(tmp_path_factory.mktemp("model") / "model", hidden_size=64, intermediate_size=96)
    make_scores(made)
    return made


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**module_environment(), **options.pop("env", {})}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_a_pipe_that_nobody_reads(flags: tuple[str, ...], model: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start("inspect", model, *flags, stdout=writing)
    os.close(writing)
    assert (process.communicate()[1], process.returncode) == ("", 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_a_full_disk_behind_the_output(flags: tuple[str, ...], model: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = start("inspect", model, *flags, stdout=full)
    err = process.communicate()[1]
    assert process.returncode == 2
    assert "cannot be written to the standard output: No space left" in " ".join(err.split())


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_signals_leave_nothing(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # As a terminal has it: under  nohup,  which ignores SIGHUP, children would ignore it, too.
    process = start("--model", model, "--budget", "50MB", "--format", "gguf", "--types", "f32", "-o", out,
                    stdout=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # fmt: skip
    while process.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.01)
    process.send_signal(number)
    err = process.communicate()[1]
    assert (process.returncode, list(tmp_path.iterdir())) == (130, []), err
    assert "interrupted; nothing was left half-written" in err


# Modules in the order in which a command imports them; the last ones as it begins.
@pytest.mark.parametrize("module", ["typer", "acip_export.errors", "acip_export.io.inputs", "acip_export.io.hub"])
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_while_modules_are_imported(number: signal.Signals, flags: tuple[str, ...], module: str) -> None:
    """Moments are told by what Python says of its imports, as machines differ."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-X", "importtime", "-m", "acip_export", "formats", *flags],
        env=module_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.split("|")[-1].strip() == module:
            break
    process.send_signal(number)
    out, err = process.communicate()
    said = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("import time:"))
    assert process.returncode == 130, said
    if flags:
        assert (json.loads(out)["error"], said) == ("interrupted; nothing was left half-written", "")
    else:
        assert (out, said) == ("", "interrupted; nothing was left half-written\n")


def test_a_signal_behind_the_last_word() -> None:
    """What Python does at its end, with libraries loaded, is not cut by a traceback."""
    process = subprocess.run(
        [sys.executable, "-P", "-c", STOPPED_LATE, "--version"],
        env=module_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (130, "")
    assert process.stdout == f"{__version__}\n"


def test_a_signal_behind_a_command_in_another_program() -> None:
    """The process is not ours: whoever called the command line hears of it."""
    program = (
        "import os, signal, time\nfrom acip_export.cli import main as cli\ncli.app = lambda **_: 0\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    print('heard')\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], env=module_environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_two_signals_at_once_are_one() -> None:
    """The process tidies up, and ends without waiting for its threads."""
    process = subprocess.run(
        [sys.executable, "-P", "-c", STOPPED_TWICE],
        env=module_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (130, "tidied up\n"), process.stderr
    assert process.stderr == "interrupted; nothing was left half-written\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "tr_TR.UTF-8"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"TZ": "Nowhere/Never"},
        {"HOME": "/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"},
        {"SOURCE_DATE_EPOCH": "0"},
        {"TERM": "dumb", "COLUMNS": "1"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_surroundings_change_no_byte(environment: dict[str, str], model: Path, tmp_path: Path) -> None:
    """Locale, clock, home and terminal; in a directory with blanks, umlauts, quotes and a line break."""
    odd = tmp_path / "é 'a\"b\n$(touch x) %s {0} [red]"
    odd.mkdir()
    written = []
    for index, env in enumerate(({}, environment)):
        out = odd / f"out{index}"
        process = start("--model", model, "--budget", "200kB", "--budget-scope", "file", "--format", "gguf",
                        "--types", "q8_0", "--no-verify", "-o", out, env=env, stdout=subprocess.DEVNULL)  # fmt: skip
        err = process.communicate()[1]
        assert process.returncode == 0, err
        written.append({file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()})
    assert written[0] == written[1]
