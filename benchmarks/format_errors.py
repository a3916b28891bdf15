"""Measure every type's rounding error on Gaussian weights: ``relative_mse`` in acip_export/weight_types.py.

    python -m benchmarks.format_errors [--format gguf] [--types q4_k,q8_0] > errors.json

One JSON document on stdout, with versions and machine; a readable table on stderr. Add a format to ``MEASURES``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import torch

from acip_export.weight_types import WeightType, types_of

ROWS, COLUMNS, SEED = 64, 2048, 0

Floats = npt.NDArray[np.float32]


def gaussian(rows: int = ROWS, columns: int = COLUMNS) -> Floats:
    """Standard normal weights, (rows, columns)."""
    return np.random.default_rng(SEED).standard_normal((rows, columns), np.float32)


def gguf_round_trip(form: WeightType, weights: Floats) -> Floats:
    """Through ggml and back with uniform importance, as ranked layers are quantized with importance."""
    from converters.gguf import ggml_library as ggml

    data = ggml.quantize(torch.from_numpy(weights), form.name, torch.ones(weights.shape[1]))
    return ggml.dequantize(data, weights.shape, form.name)


def onnx_round_trip(form: WeightType, weights: Floats) -> Floats:
    """Through our quantizer for MatMulNBits and back."""
    from converters.onnx.quantize import dequantize, quantize

    return weights if form.is_float else dequantize(quantize(weights, form), form, weights.shape[1])


MEASURES: dict[str, Callable[[WeightType, Floats], Floats]] = {"gguf": gguf_round_trip, "onnx": onnx_round_trip}


def relative_mse(form: WeightType, weights: Floats) -> float:
    """Mean square rounding error over mean square weight."""
    back = MEASURES[form.format](form, weights).astype(np.float64)
    return float(((back - weights) ** 2).sum() / (weights.astype(np.float64) ** 2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=sorted(MEASURES), default="gguf")
    parser.add_argument("--types", default="", help="comma-separated; all by default")
    options = parser.parse_args()
    wanted = set(filter(None, options.types.split(",")))
    weights = gaussian()
    results = []
    for form in types_of(options.format):
        if wanted and form.name not in wanted:
            continue
        begin = time.perf_counter()
        error = relative_mse(form, weights)
        seconds = time.perf_counter() - begin
        results.append({"type": form.name, "bits": form.bits_per_weight, "relative_mse": error, "seconds": seconds})
        print(
            f"{form.name:10} {form.bits_per_weight:6.3f} bits  {error:10.3e}  table {form.relative_mse:10.3e}  "
            f"{seconds:6.2f} s",
            file=sys.stderr,
        )
    packages = {"gguf": ("gguf", "xllamacpp", "numpy"), "onnx": ("onnxruntime", "numpy")}[options.format]
    document = {
        "benchmark": "format_errors",
        "format": options.format,
        "weights": {"rows": ROWS, "columns": COLUMNS, "seed": SEED, "distribution": "standard normal"},
        "machine": {"platform": platform.platform(), "processor": platform.machine()},
        "versions": {name: version(name) for name in packages},
        "results": results,
    }
    json.dump(document, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
