"""Write and read ``weights.safetensors``: a number is stored in half precision, or in eight bits and a scale a row."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.plan import TensorDecision
from acip_export.io.frozen import thawed
from acip_export.model.checkpoint import Checkpoint

WEIGHTS = "weights.safetensors"
_DTYPES = {"f32": "F32", "f16": "F16", "row8": "I8"}
Encoded = dict[str, torch.Tensor]


def encode(weight: torch.Tensor, kind: str) -> Encoded:
    """Store a matrix or vector as a type does; the key of the numbers is empty."""
    if kind == "row8":
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        return {"": (weight.float() / scale).round().to(torch.int8), ".scale": scale}
    return {"": weight.to(torch.float16 if kind == "f16" else torch.float32)}


def decode(encoded: Encoded) -> torch.Tensor:
    """Return float32 numbers."""
    numbers = encoded[""].float()
    return numbers * encoded[".scale"] if ".scale" in encoded else numbers


def _header(checkpoint: Checkpoint, tensors: tuple[TensorDecision, ...]) -> bytes:
    """Build the header that safetensors writes: metadata, then tensors by alignment and name."""
    entries: dict[str, tuple[str, list[int], int]] = {}
    for decision in tensors:
        kind, shape = str(decision.type), list(decision.shape)
        count = 1
        for extent in shape:
            count *= extent
        entries[decision.name] = (_DTYPES[kind], shape, count * {"f32": 4, "f16": 2, "row8": 1}[kind])
        if kind == "row8":
            entries[f"{decision.name}.scale"] = ("F32", [shape[0], 1], 4 * shape[0])
    order = sorted(entries, key=lambda name: (-{"F32": 4, "F16": 2, "I8": 1}[entries[name][0]], name))
    header: dict[str, object] = {"__metadata__": _metadata(checkpoint)}
    offset = 0
    for name in order:
        dtype, shape, size = entries[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    return {"comment": checkpoint.options.get("tiny_comment", "")}


def predict(checkpoint: Checkpoint, tensors: tuple[TensorDecision, ...]) -> dict[str, int]:
    """Return the bytes of both files."""
    weights = 8 + len(_header(checkpoint, tensors)) + sum(decision.nbytes for decision in tensors)
    return {WEIGHTS: weights, "config.json": len(json.dumps(thawed(checkpoint.config)))}


def write(model: MaterializedModel, out: Path) -> None:
    """Write both files."""
    stored: Encoded = {}
    for decision in model.plan.tensors:
        for suffix, numbers in encode(model.read(decision.name), str(decision.type)).items():
            stored[decision.name + suffix] = numbers.contiguous()
    save_file(stored, out / WEIGHTS, _metadata(model.as_checkpoint()))
    (out / "config.json").write_text(json.dumps(thawed(model.as_checkpoint().config)), encoding="utf-8")


def read(export: Path) -> dict[str, torch.Tensor]:
    """Return every weight in float32."""
    stored = load_file(export / WEIGHTS)
    names = [name for name in stored if not name.endswith(".scale")]
    return {n: decode({s: stored[n + s] for s in ("", ".scale") if n + s in stored}) for n in names}


def missing(export: Path, model: MaterializedModel) -> tuple[int, list[str]]:
    """Count the tensors, and name those that are not there."""
    there = read(export)
    wanted = model.plan.tensors
    return len(wanted), [d.name for d in wanted if d.name not in there or tuple(there[d.name].shape) != d.shape]
