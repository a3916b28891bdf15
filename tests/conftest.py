"""Settings for every test."""

from __future__ import annotations

import os

# Tiny matrices gain nothing from threads, and on a busy machine waiting for each other costs minutes. Read when the
# libraries are loaded, and inherited by the processes that tests start.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
# Workers of pytest-xdist say how wide the terminal is: where sentences are folded is no property of what they say.
os.environ.pop("COLUMNS", None)

import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from acip_export.artifacts.scores import ScoreFile  # noqa: E402
from acip_export.cli import main as cli  # noqa: E402
from acip_export.io import kept_states  # noqa: E402
from acip_export.lowrank import feedback_cache  # noqa: E402
from tests.materialization.moments import scores_with_moments  # noqa: E402
from tests.support import Outcome, Run, Shared, make_model  # noqa: E402

# How fast a busy machine draws examples is no property of what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure() -> None:
    """Have Ctrl-C interrupt: tests that send it may themselves run in the background, where shells have it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    """Put signal handlers back that a command line in this process has set: they take two signals at once for one."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def _own_factors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Read no factor of error feedback that the user has kept, and add none; programs of the user's cache stay."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("feedback")
        patch.setattr(feedback_cache, "feedback_directory", lambda: place)
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("plan", "--budget", ...)``: the command line, its error boundary included, in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["acip-export", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """``shared(name, make)``: the directory that ``make`` fills, once for all workers of this run; only to be read."""
    place = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        place = place.parent  # that of the whole run

    def once(name: str, make: Callable[[Path], object]) -> Path:
        made, whole = place / f"shared-{name}", place / f"shared-{name}.whole"
        with FileLock(place / f"shared-{name}.lock"):
            if not whole.exists():
                shutil.rmtree(made, ignore_errors=True)  # of a worker that failed
                made.mkdir()
                make(made)
                whole.touch()
        return made

    return once


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of random weights, for modules that have no other."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def scores(model: Path, tmp_path_factory: pytest.TempPathFactory) -> ScoreFile:
    """Scores of the tiny model, with moments; of each module its own, since caches are written beside them."""
    return scores_with_moments(model, tmp_path_factory.mktemp("scores") / "tiny.acip", gradients=True)


@pytest.fixture
def kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep states behind every block, however soon after the last and however long writing takes."""
    monkeypatch.setattr(kept_states, "_AT_MOST_LOST", 0.0)
    monkeypatch.setattr(kept_states, "_TIMES_WRITING", 0.0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With ACIP_REQUIRE_RUNTIMES a skipped test is a failed one: a missing runtime must not look green."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("ACIP_REQUIRE_RUNTIMES") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
