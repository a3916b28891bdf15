"""Damage files of every kind at random and read them: a sentence of ours, soon, or a finding that is kept.

    python -m tools.fuzz --seconds 300

Inputs whose outcome is new go into the corpus, from which later runs go on. The exit code is 1 if there was a finding.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from acip_export.errors import AcipError

Reader = Callable[[Path], object]
# Seconds that reading a small file may take.
SLOW = 10.0
_TOKENS = (b"null", b"-1", b"1e400", b"NaN", b"[" * 64, b'{"a":', b"\xff" * 8, b"\x00" * 8, b"9" * 400, b'"\\ud800"')


def readers() -> Mapping[str, Reader]:
    """Return what reads each kind of file, by the ending of its name."""
    from acip_export.artifacts.plan import load_plan
    from acip_export.artifacts.report import load_report
    from acip_export.artifacts.scores import load_scores
    from acip_export.check.config import load_config
    from acip_export.check.lock import load_lock
    from acip_export.devices import load_devices
    from acip_export.errors import CheckpointError
    from acip_export.inspection import read_anatomy
    from acip_export.io.atomic import read_json_object
    from acip_export.model.config_fields import check_config
    from acip_export.model.tokenizer_files import check_tokenizer
    from acip_export.text.documents import read_documents
    from converters.gguf.tokenizer.sentencepiece import _read_model_file

    return {
        ".gguf": read_anatomy,
        ".onnx": read_anatomy,
        ".safetensors": read_anatomy,
        ".acip": load_scores,
        ".plan.json": load_plan,
        ".report.json": load_report,
        ".lock.json": load_lock,
        ".check.toml": load_config,
        ".devices.toml": load_devices,
        ".config.json": lambda file: check_config(file, read_json_object(file, CheckpointError)),
        ".tokenizer.json": lambda file: check_tokenizer(file, read_json_object(file, CheckpointError)),
        ".model": _read_model_file,
        ".jsonl": lambda file: list(read_documents(file)),
        ".csv": lambda file: list(read_documents(file)),
    }


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Change, cut, repeat or replace some bytes."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, max(0, len(found) - 1))
        # Heads are where the structure is.
        at = at if chance.random() < 0.3 else min(at, chance.randint(0, 400))
        length = chance.choice((1, 1, 2, 4, 8, 64))
        match chance.randrange(5):
            case 0:
                found[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del found[at : at + length]
            case 2:
                found[at:at] = found[at : at + length]
            case 3:
                found[at : at + length] = chance.choice(_TOKENS)
            case _:
                del found[at:]
    return bytes(found)


def outcome(read: Reader, file: Path) -> str:
    """Read a file; what came of it, without numbers and names. A finding begins with BUG."""
    start = time.monotonic()
    try:
        read(file)
        found = "read"
    except AcipError as error:
        text = str(error).replace(str(file), "")
        found = f"{type(error).__name__}: {re.sub(r'[0-9]+|`[^`]*`|.(?<=[^a-z ]).*', '', text)[:60]}"
    except MemoryError:
        found = "BUG: MemoryError"
    except Exception as error:
        found = f"BUG: {error!r}"
    took = time.monotonic() - start
    return found if took < SLOW else f"BUG: took {took:.0f} s"


def fuzz(seeds: Path, corpus: Path, seed: int, *, seconds: float = math.inf, files: float = math.inf) -> list[str]:
    """Fuzz for a time, or so many files; return the findings.

    Args:
        seeds: a directory of whole files, named after :func:`readers`.
    """
    chance, known, findings = random.Random(seed), set[str](), list[str]()
    corpus.mkdir(parents=True, exist_ok=True)
    readers_ = readers()
    pool = {
        ending: [file.read_bytes() for place in (seeds, corpus) for file in sorted(place.glob(f"*{ending}"))]
        for ending in readers_
    }
    deadline, count = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as scratch:
        while time.monotonic() < deadline and count < files:
            count += 1
            ending = chance.choice([ending for ending in readers_ if pool[ending]])
            data = mutated(chance.choice(pool[ending]), chance)
            file = Path(scratch) / f"x{ending}"
            file.write_bytes(data)
            found = f"{ending} {outcome(readers_[ending], file)}"
            if found in known:
                continue
            known.add(found)
            kept = corpus / f"{hashlib.sha256(data).hexdigest()[:16]}{ending}"
            kept.write_bytes(data)
            pool[ending].append(data)
            if " BUG: " in found:
                findings.append(f"{kept}: {found}")
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz/corpus"))
    parser.add_argument("--seeds", type=Path, default=Path(".fuzz/seeds"))
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    asked = parser.parse_args()
    from tests.fuzz_seeds import write_seeds

    write_seeds(asked.seeds)
    sys.stdout.write(f"seed {asked.seed}\n")
    findings = fuzz(asked.seeds, asked.corpus, asked.seed, seconds=asked.seconds)
    sys.stdout.write("".join(f"{line}\n" for line in findings) or "no findings\n")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
