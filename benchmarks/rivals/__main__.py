"""Our exports against other tools' at equal bytes: KL to the dense model, perplexity, time, memory.

    python -m benchmarks.rivals                          everything that is not in benchmarks/rivals.json yet
    python -m benchmarks.rivals --only 'gguf.*Q4'        rows whose "format tool name" matches
    python -m benchmarks.rivals --ours                   ours again, from the code as it is now
    python -m benchmarks.rivals --draw                   only tables and plots

The model is that of ``samples/real.py``; every tool calibrates on the same text, llama-quantize with the importance
matrix of our score file (the mean squares of the inputs, which llama-imatrix measures too). Each file is written by a
process of its own, then run by another in its own runtime, on text that nothing has seen, spread over the evaluation
text, and compared with the dense model in float32, whose logits are kept in the user's cache. Ours has at most the
rival's bytes, all files of a directory counted. Rows are written as they come: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np

import acip_export
from acip_export.api import write_imatrix
from acip_export.artifacts.names import PAPERS
from acip_export.artifacts.scores import load_scores
from acip_export.io.atomic import new_file
from acip_export.model.checkpoint import Checkpoint
from acip_export.text.packing import pack_text
from benchmarks import real as real_benchmark
from benchmarks.rivals import pages
from benchmarks.rivals.pages import OURS, Row, title
from benchmarks.rivals.tools import HOME, Inputs, NotInstalledError, Rival, last_line, rivals
from samples import real

OUT = Path(__file__).parent.parent / "rivals.json"
ROOT = OUT.parent.parent
CONTEXT = 512


@dataclass(frozen=True)
class Setting:
    """What all rows share.

    Attributes:
        text: what it is measured on, for the JSON file. windows, dense: .npy files. scores: of our ranking.
        statistics_tokens: that the score file, and so the importance matrix, was made from.
    """

    inputs: Inputs
    scores: Path
    statistics_tokens: int | None
    text: dict[str, Any]
    windows: Path
    dense: Path


# Names the command that writes a directory.
Writer = Callable[[Setting, Path], list[str]]


def prepare(made: real.Real, scores: Path, tokens: int) -> Setting:
    """Windows, dense logits, GGUF source and importance matrix; what an earlier run made is taken."""
    checkpoint = Checkpoint.open(made.model)
    packed = pack_text(made.model, made.evaluation, CONTEXT)
    count = tokens // CONTEXT
    chosen = packed.windows[[i * len(packed.windows) // count for i in range(count)]].numpy()
    HOME.mkdir(parents=True, exist_ok=True)
    key = sha256(checkpoint.fingerprint.encode() + chosen.tobytes()).hexdigest()[:12]
    windows, dense = HOME / f"windows-{key}.npy", HOME / f"dense-{key}.npy"
    if not dense.is_file():
        from acip_export.verification.reference import pass_dense

        note("the dense model's logits")
        np.save(windows, chosen)
        with new_file(dense) as temporary:
            shape = (*chosen.shape, checkpoint.config["vocab_size"])
            logits = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            for place, scored in enumerate(pass_dense(made.model, list(chosen)).logits()):
                logits[place] = scored
            logits.flush()
    source = HOME / f"source-{sha256(checkpoint.fingerprint.encode()).hexdigest()[:12]}" / "model.gguf"
    loaded = load_scores(scores)
    if not source.is_file():
        note("the model as a bf16 GGUF")
        budget = 2 * checkpoint.weight_bytes
        plan = acip_export.plan(
            checkpoint, loaded, budget=budget, scope="file", format="gguf", types=("bf16",), context=CONTEXT
        )
        acip_export.export(plan, source.parent, model=checkpoint, scores=loaded, verify=False)
    imatrix = HOME / f"imatrix-{loaded.sha256[:12]}.gguf"
    if not imatrix.is_file():
        write_imatrix(checkpoint, loaded, imatrix)
    record = json.loads((made.model.parent / real.RECORD).read_text())
    record.pop("rescaling", None)  # its figures differ by the machine's arithmetic, the model does not
    text = {
        "source": made.evaluation.name,
        "sha256": packed.sha256,
        "windows": [count, CONTEXT],
        "model": record,
    }
    inputs = Inputs(made.model, source, imatrix, made.calibration)
    return Setting(inputs, scores, loaded.ranked_by.statistics_tokens, text, windows, dense)


def watched(command: list[str], hours: float) -> Row:
    """Run a command; seconds, its processors' seconds and the peak of its resident memory.

    Raises:
        RuntimeError: it failed, or took too long; the message is the last that it said.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, env=environment)
        usage: resource.struct_rusage | None = None
        peak = 0
        while usage is None:
            peak = max(peak, high_water(process.pid))
            pid, status, spent = os.wait4(process.pid, os.WNOHANG)
            if pid:
                usage, process.returncode = spent, os.waitstatus_to_exitcode(status)
            elif time.perf_counter() - started > hours * 3600:
                process.kill()
                process.wait()
                raise RuntimeError(f"not done after {hours:g} hours")
            else:
                time.sleep(0.1)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"ended with {process.returncode}: {last_line(said.read())}")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": peak or None,
    }


def high_water(pid: int) -> int:
    """Peak resident bytes of a process so far, 0 where they are not told; what ``wait`` says counts ours before."""
    try:
        return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def measured(setting: Setting, fmt: str, write: list[str], out: Path, hours: float) -> Row:
    """Write one directory and run it."""
    out.mkdir()
    written = watched(write, hours)
    nbytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file() and file.name not in PAPERS)
    note(f"  {nbytes:,} bytes, {written['seconds']} s")
    limit_cache(out)
    result = out.with_suffix(".json")
    paths = map(str, (out, setting.windows, setting.dense, result))
    watched([sys.executable, "-m", "benchmarks.rivals.measure", fmt, *paths], hours)
    load = round(os.getloadavg()[0], 1)
    return {"bytes": nbytes, "writing": written, "load": load, **json.loads(result.read_text())}


def limit_cache(directory: Path) -> None:
    """Let genai reserve a cache for as many tokens as ours is planned for: else memory is of other settings."""
    file = directory / "genai_config.json"
    if file.is_file():
        config = json.loads(file.read_text())
        config["search"]["max_length"] = CONTEXT
        file.write_text(json.dumps(config, indent=1))


def commit() -> str:
    """Of the code that makes ours."""
    found = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def jobs(document: dict[str, Any], arguments: argparse.Namespace) -> Iterator[tuple[Row, Writer]]:
    """What is to be measured, as a row without figures: rivals that have none, and ours beside every rival's row."""
    chosen = re.compile(arguments.only or "")
    for rival in () if arguments.ours else rivals():
        row = {"format": rival.format, "tool": rival.tool, "name": rival.name}
        missing = not any(title(other) == title(row) for other in document["rows"])
        if chosen.search(title(row)) and (missing or arguments.again):
            yield row, theirs(rival)
    now = commit()
    for beside in () if arguments.theirs else list(document["rows"]):
        row = {"format": beside["format"], "tool": OURS, "name": title(beside), "commit": now}
        kept = next((other for other in document["rows"] if title(other) == title(row)), None)
        fair = beside["tool"] != OURS and "bytes" in beside and chosen.search(title(beside))
        if fair and (kept is None or (arguments.ours and kept["commit"] != now)):
            yield row, ours(beside)


def theirs(rival: Rival) -> Writer:
    """What writes another tool's file."""
    return lambda setting, out: rival.command(setting.inputs, out)


def ours(beside: Row) -> Writer:
    """What writes our export of at most the bytes of another row."""

    def command(setting: Setting, out: Path) -> list[str]:
        fields = (setting.inputs.model, setting.scores, beside["format"], beside["bytes"], CONTEXT, out)
        return [sys.executable, "-m", "benchmarks.rivals.ours", *map(str, fields)]

    return command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help='a regular expression for "format tool name"')
    parser.add_argument("--theirs", action="store_true", help="no exports of ours")
    parser.add_argument("--ours", action="store_true", help="ours alone, those of other commits again")
    parser.add_argument("--again", action="store_true", help="measure rows of rivals again")
    parser.add_argument("--draw", action="store_true", help="only tables and plots")
    parser.add_argument("--scores", type=Path, help="default: ranked with the defaults of benchmarks/real.py, and kept")
    parser.add_argument("--tokens", type=int, default=8_192, help="held-out ones; other than before starts again")
    parser.add_argument("--minutes", type=float, help="begin no row after so many; the next run goes on")
    parser.add_argument("--hours", type=float, default=1.0, help="the most that one tool may take")
    arguments = parser.parse_args()
    document: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {"rows": []}
    if not arguments.draw:
        made = real.make(real.cached().model.parent)
        scores = arguments.scores or Path(str(real_benchmark.ranked(made, "fisher", None)[0].file))
        setting = prepare(made, scores, arguments.tokens)
        if document.get("text") not in (None, setting.text):
            note("measured on another text or model, or with other importance: starting again")
            document["rows"] = []
        document = {"benchmark": "rivals", "text": setting.text, "machine": real_benchmark.machine(), **document}
        run(document, setting, arguments)
    pages.update(document, ROOT)


def run(document: dict[str, Any], setting: Setting, arguments: argparse.Namespace) -> None:
    """Measure what is missing, and keep it."""
    started = time.monotonic()
    for row, writer in jobs(document, arguments):
        if arguments.minutes is not None and time.monotonic() - started > arguments.minutes * 60:
            break
        note(title(row))
        with tempfile.TemporaryDirectory(dir=HOME) as scratch:
            out = Path(scratch) / "export"
            try:
                row["statistics_tokens"] = setting.statistics_tokens
                row |= measured(setting, row["format"], writer(setting, out), out, arguments.hours)
                note(f"  KL {row['mean_kl']:.4f}, same top {row['same_top']:.1%}, perplexity {row['perplexity']:.2f}")
            except (NotInstalledError, RuntimeError) as error:
                row["failed"] = str(error)
                note(f"  {error}")
        keep(document, row)


def keep(document: dict[str, Any], row: Row) -> None:
    """Put a row into the file, one line a row; what another run has written there meanwhile stays."""
    if OUT.is_file():
        there = json.loads(OUT.read_text())
        if there["text"] == document["text"]:
            document["rows"] = there["rows"]
    document["rows"] = [*(other for other in document["rows"] if title(other) != title(row)), row]
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1)
    lines = ",\n  ".join(json.dumps(each) for each in document["rows"])
    temporary = OUT.with_suffix(".tmp")
    temporary.write_text(f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
    temporary.replace(OUT)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
