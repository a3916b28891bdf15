"""Write requirements.txt: the SHA-256 of every package that ``acip-export[all,dev]`` needs, at the tested versions.

pip itself is asked which files it would install here, and what their hashes are. So the file holds for the platform
that it was written on, which its first lines name; elsewhere pip stops at the first file with another hash.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.txt"


def report(extras: str) -> list[Mapping[str, Any]]:
    """What pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        options = ["--report", str(file), "--constraint", str(ROOT / "constraints.txt"), f"{ROOT}[{extras}]"]
        subprocess.run([*command, *options], check=True)
        found: list[Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["install"]
        return found


def lock_lines(packages: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line a package, without this project's own; no line says where a file came from."""
    lines = []
    for package in packages:
        archive = package["download_info"].get("archive_info")
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        if archive is None:  # a directory: the project itself
            continue
        # A build for one machine has a suffix (+cpu), which constraints.txt leaves open.
        lines.append(f"{name}=={version.partition('+')[0]} --hash=sha256:{archive['hashes']['sha256']}")
    return sorted(lines, key=str.lower)


def platform_line() -> str:
    """Return the line that says where a file written here holds."""
    return (
        f"# For {platform.system()} {platform.machine()}, Python {sys.version_info[0]}.{sys.version_info[1]}, and the "
        "build of torch for processors (+cpu), which pip has to be able to find."
    )


def holds_here(text: str) -> bool:
    """Tell whether a file was written on this platform, for this Python."""
    return platform_line() in text.splitlines()


def main() -> None:
    """Ask pip, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="all,dev", help="of the project (default: all,dev)")
    parser.add_argument("--holds-here", action="store_true", help="write nothing; exit 1 where the file does not hold")
    options = parser.parse_args()
    if options.holds_here:
        sys.exit(not holds_here(LOCK.read_text(encoding="utf-8")))
    head = [
        "# Written by `make lock` from constraints.txt: what pip installs for acip-export[all,dev], file by file.",
        platform_line(),
    ]
    lines = lock_lines(report(options.extras))
    LOCK.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
