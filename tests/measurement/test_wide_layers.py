"""Layers of many inputs take no matrix of inputs by inputs where nothing more than its diagonal is known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WIDE = 6016
# Narrow first: what libraries take once is no matter. The peak is set back between both.
MEASURE = """
import sys
from pathlib import Path
from acip_export.api.rounding_errors import rounding_errors
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, resolve
from tests.support import make_model, make_scores

def status(field):
    return int(Path("/proc/self/status").read_text().partition(field)[2].split()[0]) * 1024

def measure(model):
    checkpoint = Checkpoint.open(model)
    space = resolve(PlanRequest(sys.argv[1], types=(sys.argv[2],)), checkpoint).space
    rounding_errors(checkpoint, make_scores(model), space)

sizes = {"hidden_size": 64, "head_dim": 16, "vocab_size": 512, "num_hidden_layers": 1}
models = [make_model(Path(str(size)), intermediate_size=size, **sizes) for size in (96, int(sys.argv[3]))]
measure(models[0])
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
measure(models[1])
print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("kind", "form"), [("gguf", "q4_0"), ("onnx", "int4")])
def test_a_layer_of_many_inputs(kind: str, form: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, kind, form, str(WIDE)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    # One of them, in float64, is eight times as large; one kept layer, its copies and a quantizer's are not a tenth.
    assert int(done.stdout.split()[-1]) < WIDE**2
