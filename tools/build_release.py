"""Build the wheel, the sdist and their bill of materials, so that two builds of one commit have the same bytes.

    python -m tools.build_release dist

Times are those of SOURCE_DATE_EPOCH (default: the last commit's, else 1980), owners and the umask of who builds are
left out, members are sorted.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
_FILES = ("pyproject.toml", "README.md", "LICENSE")
_PACKAGES = ("acip_export", "converters", "optimum")
# The first moment that a zip archive can hold.
_EARLIEST = 315532800


def epoch() -> int:
    """Return the time that files of the release have."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
        given = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return max(_EARLIEST, int(given or 0))


def build(out: Path) -> list[Path]:
    """Build both into ``out``, from a copy: what other builds left in the checkout is not of this one."""
    out.mkdir(parents=True, exist_ok=True)
    moment = epoch()
    code = "import sys; from setuptools import build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch) / "source", Path(scratch) / "made"
        made.mkdir()
        source.mkdir()
        for package in _PACKAGES:
            shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
        for file in _FILES:
            shutil.copyfile(ROOT / file, source / file)
        for path in (*sorted(source.rglob("*")), source):
            path.chmod(0o755 if path.is_dir() else 0o644)
            os.utime(path, (moment, moment))
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(moment), "PYTHONHASHSEED": "0"}
        for kind in ("sdist", "wheel"):
            subprocess.run(
                [sys.executable, "-c", code, kind, str(made)],
                cwd=source,
                env=environment,
                check=True,
                stdout=subprocess.DEVNULL,
                umask=0o022,
            )
        (sdist,), (wheel,) = made.glob("*.tar.gz"), made.glob("*.whl")
        _settle(sdist, out / sdist.name, moment)
        shutil.copyfile(wheel, out / wheel.name)
    return [out / sdist.name, out / wheel.name]


def _settle(archive: Path, target: Path, moment: int) -> None:
    """Write a tar archive again: sorted, at one time, of nobody."""
    stream = io.BytesIO()
    with tarfile.open(archive) as old, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            content = old.extractfile(member)
            settled = tarfile.TarInfo(member.name)
            settled.type, settled.size, settled.mtime = member.type, member.size, moment
            settled.mode = 0o755 if member.isdir() else 0o644
            new.addfile(settled, content)
    target.write_bytes(gzip.compress(stream.getvalue(), mtime=moment))


if __name__ == "__main__":
    from tools.generate_sbom import write_bill

    place = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").absolute()
    files = build(place)
    for file in (*files, write_bill(files, epoch(), place)):
        sys.stdout.write(f"{file}\n")
