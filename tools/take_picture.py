"""Takes the picture of a report that README.md shows, of one of the demo's exports: ``make demo picture``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / ".demo" / "gguf-stock-3.5MB" / "report.html"
PICTURE = ROOT / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 960, 1000


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.browser import open_page

    if not REPORT.is_file():
        raise SystemExit(f"{REPORT.relative_to(ROOT)} does not exist; make it with  make demo")
    PICTURE.parent.mkdir(exist_ok=True)
    with open_page(WIDTH, HEIGHT, color_scheme="light") as page:
        page.goto(REPORT.as_uri())
        page.screenshot(path=PICTURE)


if __name__ == "__main__":
    main()
