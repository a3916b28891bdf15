"""What the linear algebra of a layer is said to take is what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from acip_export.ranking.layer_memory import Shape, components_bytes, gradient_packing_bytes, packing_bytes

SQUARE, WIDE, TALL, NARROW = (512, 512), (384, 1536), (1536, 384), (128, 1280)
SHAPES = (SQUARE, WIDE, TALL, NARROW)
# Of the C library and of what multiplies matrices, buffers of a thread and small blocks: at most 5 MB on one machine,
# and others have other kernels. A matrix of the wide shapes is 19 MB.
LESS, MORE = 1_000_000, 12_000_000
MEASURED = """
import json, sys
from pathlib import Path
import torch
from acip_export.io.heap import give_back, large_blocks_apart
from acip_export.lowrank.components import whitened_components
from acip_export.lowrank.moments import is_projected, pack_gradients, pack_moment
from acip_export.lowrank.whitening import Whitening


def status(name):
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024


def peak(work):
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = status("VmRSS")
    made = work()
    return made, status("VmHWM") - before


def moment(n):
    rows = torch.randn(256, n, generator=generator)
    return rows.T @ rows / 256 + 0.3 * torch.eye(n)


def measured(out, inputs):
    weight = torch.randn(out, inputs, generator=generator)
    of_inputs, of_outputs = moment(inputs), moment(out)
    right, packing = peak(lambda: pack_moment(of_inputs))
    left, gradients = peak(lambda: pack_gradients(of_outputs, weight))

    def factorize():
        root = Whitening.packed(left)
        if is_projected((out, inputs)):
            root = Whitening.lifted(root, of_outputs.diagonal().numpy(), weight)
        return whitened_components(weight, Whitening.packed(right), root)

    return packing, gradients, peak(factorize)[1]


torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
with large_blocks_apart():
    measured(64, 64)  # libraries are loaded when they are first used
    print(json.dumps([measured(*shape) for shape in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def peaks() -> dict[Shape, list[int]]:
    """By shape what packing the inputs' moment, packing the gradients' and making components took."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks of memory are measured on Linux")
    command = [sys.executable, "-c", MEASURED, json.dumps(SHAPES)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(zip(SHAPES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "tall", "narrow"])
def test_a_layer_takes_what_is_counted(peaks: dict[Shape, list[int]], shape: Shape) -> None:
    counted = [packing_bytes(shape[1]), gradient_packing_bytes(shape), components_bytes(shape)]
    for expected, found in zip(counted, peaks[shape], strict=True):
        assert 0.85 * expected - LESS < found < 1.1 * expected + MORE, (counted, peaks[shape])


def test_wide_inputs_cost_more_than_wide_outputs() -> None:
    """Moments of many outputs are kept as the few columns of the weight that they are about."""
    wide, tall = components_bytes((2048, 5632)), components_bytes((5632, 2048))
    assert 0.9e9 < wide < 1.0e9 and 0.5e9 < tall < 0.6e9
