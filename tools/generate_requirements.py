"""Write requirements.txt: what ``acip-export[all]`` installs at the tested versions, each with its file's hash.

    pip install --require-hashes --no-deps -r requirements.txt && pip install --no-deps acip-export

Hashes are those of this platform's files (a lock for every platform would pin what nobody here has tested).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def resolved(extras: str) -> dict[str, tuple[str, str]]:
    """Ask pip what it would install into an empty environment: ``{name: (version, sha256)}``."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        command += ["--ignore-installed", "--only-binary", ":all:", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*command, "--report", str(report), f"{ROOT}[{extras}]"], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {
        each["metadata"]["name"]: (
            each["metadata"]["version"],
            each["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for each in found
        if "archive_info" in each["download_info"]  # not this package itself
    }


if __name__ == "__main__":
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    lines = [f"# Python {version}, {platform.system()} {platform.machine()}; written by  make requirements"]
    for name, (number, digest) in sorted(resolved("all").items(), key=lambda item: item[0].lower()):
        lines.append(f"{name}=={number} \\\n    --hash=sha256:{digest}")
    (ROOT / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
