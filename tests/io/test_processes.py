"""The environment that processes of ours are started with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from acip_export.io import processes
from acip_export.io.processes import let_threads_sleep, let_threads_spin, module_environment

SLEEPING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
NUMPY = "OPENBLAS_NUM_THREADS"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SLEEPING, NUMPY):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(processes, "_ours", set())


def test_our_threads_sleep_and_those_of_runtimes_do_as_elsewhere() -> None:
    let_threads_sleep()
    assert [os.environ[name] for name in (*SLEEPING, NUMPY)] == ["passive", "1000", "1"]
    assert module_environment().keys().isdisjoint((*SLEEPING, NUMPY))
    let_threads_spin()
    assert os.environ.keys().isdisjoint((*SLEEPING, NUMPY))


@pytest.mark.parametrize("name", SLEEPING)
def test_what_the_user_said_holds_for_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    let_threads_sleep()
    (other,) = set(SLEEPING) - {name}
    let_threads_spin()
    assert os.environ[name] == module_environment()[name] == "7" and other not in os.environ


def test_what_the_user_said_of_numpy_holds_for_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NUMPY, "7")
    let_threads_sleep()
    assert [os.environ[name] for name in (*SLEEPING, NUMPY)] == ["passive", "1000", "7"]


# What numpy and PyTorch find when they are loaded: they do not look again.
LOADING = """
import os, sys
from acip_export.__main__ import main

def loading(event, arguments):
    if event == "import" and arguments[0] == "numpy":
        os.write(1, (os.environ.get("OPENBLAS_NUM_THREADS", "nothing") + "\\n").encode())

sys.addaudithook(loading)
main()
"""


def test_the_command_says_it_before_numpy_is_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOADING, "formats"],
        env=module_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "1"), done.stderr
