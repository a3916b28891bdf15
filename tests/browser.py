"""A headless Chromium for tests of pages; they are skipped where it is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

# No sandbox as root, no graphics card, and no traffic of the browser's own.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def open_page(width: int = 1280, height: int = 800, **settings: object) -> Iterator[Page]:
    """A page of a browser with a profile of its own; what it complains about fails the test.

    Args:
        settings: of playwright's ``new_page``, for example ``color_scheme="dark"``.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    complaints: list[str] = []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=list(_FLAGS))
        page: Page = browser.new_page(viewport={"width": width, "height": height}, **settings)
        # The processor is the page's graphics card too; on a busy machine a click waits for it.
        page.set_default_timeout(180_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"request failed: {request.url}"))
        try:
            yield page
        finally:
            browser.close()
    assert not complaints, complaints
