"""Settings for every test."""

from __future__ import annotations

import os

# Tiny matrices gain nothing from threads, and on a busy machine waiting for each other costs minutes. Read when the
# libraries are loaded, and inherited by the processes that tests start.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import pytest  # noqa: E402


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With ACIP_REQUIRE_RUNTIMES a skipped test is a failed one: a missing runtime must not look green."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("ACIP_REQUIRE_RUNTIMES") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
