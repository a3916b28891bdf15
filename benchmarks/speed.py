"""Predicted and measured tokens per second, after calibrating the machine: ``python -m benchmarks.speed MODEL ...``.

Exports are made of random numbers in the shapes of the models, every matrix in one type; one more has the shape of
TinyLlama's 1.1 billion parameters. All of them run in several rounds, minutes apart: two processors of a virtual
machine may be two threads of one core for a while, which takes a third of both. The shortest times count.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from acip_export.api.speed import Sizes, made_checkpoint, measure_speeds, shortest_times, tensor_shapes, uniform
from acip_export.artifacts.plan import Serving
from acip_export.artifacts.speeds import SpeedTable, load_speeds
from acip_export.errors import UnsupportedError
from acip_export.formats.registry import export_format
from acip_export.io.processes import let_threads_spin
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning.speed import Predictor
from acip_export.progress import silent

_CONTEXT, _NEW = 66, 2
_TYPES = {"gguf": ("q8_0", "q4_0", "q6_k", "q4_k"), "onnx": ("int8", "int4-b64")}
_LARGE, _LARGE_TYPES = Sizes(2048, 5632, 22, vocabulary=32_000), ("q4_k", "int4-b64")
_SECONDS = 2.5


def _rows(
    name: str, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], table: SpeedTable, only: tuple[str, ...]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for format_name, types in _TYPES.items():
        format = export_format(format_name)
        serving = Serving(_CONTEXT, next(iter(format.cache_types)), _CONTEXT)
        for type_name in types:
            if only and type_name not in only:
                continue
            if any(len(shape) == 2 and not format.type(type_name).fits(shape[1]) for shape in shapes.values()):
                continue
            with TemporaryDirectory() as place:
                try:
                    format.prepare(checkpoint, serving.backend, serving.context, silent)
                    decisions = uniform(format, shapes, type_name)
                    format.imitate(checkpoint, format.layouts[0].name, decisions, serving, Path(place))
                except UnsupportedError:
                    continue
                for session in format.sessions:
                    speeds = table.runtimes[session.runtime]
                    predictor = Predictor(format, checkpoint.shape, session.runtime, speeds, serving)
                    predicted = predictor.speed(decisions)
                    assert predicted is not None
                    with session.open(Path(place), serving) as opened:
                        prompt, answer = shortest_times(opened, _CONTEXT - _NEW, _SECONDS)
                    rows.append(
                        {
                            "model": name,
                            "runtime": session.runtime,
                            "type": type_name,
                            "predicted": {"prompt": predicted.prompt, "answer": predicted.answer},
                            "measured": {"prompt": 1 / prompt, "answer": 1 / answer},
                        }
                    )
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def _round(models: list[Path], large: bool, table: SpeedTable) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        checkpoint = Checkpoint.open(model)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        rows += _rows(f"{model.parent.name}/{model.name}", checkpoint, shapes, table, ())
    if large:
        with TemporaryDirectory() as place:
            checkpoint = made_checkpoint(Path(place) / "model", _LARGE)
            rows += _rows("1.1B shape", checkpoint, dict(tensor_shapes(_LARGE)), table, _LARGE_TYPES)
    return rows


def _shortest(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Keep the fastest run of each row, and compare it with what was predicted."""
    rows = []
    for same in zip(*rounds, strict=True):
        measured = {kind: max(row["measured"][kind] for row in same) for kind in ("prompt", "answer")}
        ratios = {f"{kind}_ratio": same[0]["predicted"][kind] / speed for kind, speed in measured.items()}
        slowest = {kind: min(row["measured"][kind] for row in same) for kind in measured}
        rows.append({**same[0], "measured": measured, "slowest_round": slowest, **ratios})
    return rows


def main() -> None:
    """Calibrate, or read a table; then every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--speeds", type=Path, help="A table of  acip-export calibrate -o; default: measure one.")
    parser.add_argument("--large", action="store_true", help="Also the shape of 1.1 billion parameters.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/speed.json"))
    asked = parser.parse_args()
    let_threads_spin()  # as they do where exports run
    table = load_speeds(asked.speeds) if asked.speeds else measure_speeds()
    rows = _shortest([_round(asked.models, asked.large, table) for _ in range(asked.rounds)])
    within = {
        kind: sum(abs(row[f"{kind}_ratio"] - 1) <= 0.15 for row in rows) / max(1, len(rows))
        for kind in ("prompt", "answer")
    }
    document = {"threads": table.threads, "context": _CONTEXT, "within_15_percent": within, "rows": rows}
    asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
