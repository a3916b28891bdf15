"""Records the terminal session that README.md shows: commands that are run, with what they print, at 80 columns.

``make session`` after ``make demo``, whose ranking it takes.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
SESSION = ROOT / "docs" / "images" / "session.svg"
COMMANDS = (
    "acip-export --budget 3MB --format gguf --context 256",
    "acip-export chat export/gguf-3MB --max-tokens 24 -p 'def main('",
    "acip-export inspect . export/gguf-3MB --top 4",
)
_WIDTH = 80
_MOST_LINES = 14


def main(scores: Path = ROOT / ".demo" / "llama.acip") -> None:
    if not scores.is_file():
        raise SystemExit(f"{scores} does not exist; make it with  make demo")
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "llama"
        shutil.copytree(ROOT / "samples" / "llama", model)
        for file in scores.parent.glob(f"{scores.name}*"):
            shutil.copy(file, model / file.name.replace(scores.name, "llama.acip"))
        for number, command in enumerate(COMMANDS):
            if number:
                console.print()
            console.print(Text(f"$ {command}", style="bold"))
            lines = _run(command, model)
            for line in lines[:_MOST_LINES]:
                console.print(Text.from_ansi(line), soft_wrap=True)
            if len(lines) > _MOST_LINES:
                console.print(Text("...", style="dim"))
    # Its fonts would be fetched from a server; the reader's own will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="acip-export", unique_id="session"), flags=re.S)
    SESSION.write_text(svg, encoding="utf-8")


def _run(command: str, model: Path) -> list[str]:
    """What is printed, in colours; progress is left out."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(_WIDTH), "FORCE_COLOR": "1"}
    program = command.replace("acip-export", f"{sys.executable} -m acip_export", 1)
    done = subprocess.run(program, shell=True, cwd=model, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}\n{done.stderr}")
    return [line.rstrip() for line in done.stdout.rstrip("\n").splitlines()]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
