"""Our side of gguf_export.py, as a process of its own: a model directory to an export, bundle included.

    python -m benchmarks.our_steps MODEL OUT weighted|plain

A file apart, so that it loads nothing but what a conversion needs.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from acip_export.artifacts.plan import Plan, Serving, TensorDecision, decision_bytes
from acip_export.model.checkpoint import Checkpoint
from benchmarks.ruled_plan import ruled_plan, uniform_scores

FORMAT = "q4_k"


def make_plan(checkpoint: Checkpoint) -> Plan:
    """Every matrix in one type."""
    decisions = []
    for name, info in checkpoint.tensors.items():
        form = FORMAT if len(info.shape) == 2 else "f32"
        draft = TensorDecision(name, info.shape, "dense", 0, form)
        decisions.append(TensorDecision(name, info.shape, "dense", decision_bytes(draft, "gguf"), form))
    return ruled_plan(checkpoint, "gguf", "stock", Serving(512, "f16", 256), tuple(decisions))


def export(model: Path, out: Path, weighted: bool) -> None:
    """The bundle lies beside the export and is removed. Not ``weighted``: as llama.cpp rounds without an imatrix."""
    from safetensors.torch import save_file

    from acip_export.artifacts.bundle import Bundle
    from acip_export.artifacts.names import IMPORTANCE_FILE
    from acip_export.materialization import materialize_bundle
    from converters.gguf import converter

    checkpoint, bundle = Checkpoint.open(model), out.with_suffix(".bundle")
    # Both sides round with the importance one of every column.
    materialize_bundle(checkpoint, uniform_scores(checkpoint), make_plan(checkpoint), bundle)
    if not weighted:
        save_file({}, bundle / IMPORTANCE_FILE)
    out.mkdir()
    converter.convert(Bundle.open(bundle), out, lambda _: None)
    shutil.rmtree(bundle)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "weighted")
