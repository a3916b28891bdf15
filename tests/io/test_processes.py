"""The environment that processes of ours are started with."""

from __future__ import annotations

import os

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
