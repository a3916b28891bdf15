"""Which block types onnxruntime's processor kernels run, and how fast: MatMulNBits of 2, 4 and 8 bits.

    python -m benchmarks.onnx_types

Two products, 8192 x 2048 and back, for one token (decode) and 256 (prefill), one thread, the best of a few runs: the
machine is shared, so factors below two mean little. Writes benchmarks/onnx_types.json.
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

RESULT = Path(__file__).parent / "onnx_types.json"
SHAPES = ((8192, 2048), (2048, 8192))
BITS, BLOCKS, LEVELS = (4, 8, 2), (16, 32, 64, 128, 256), (4, 0)
# Tokens at once, runs
CASES = {"decode_ms": (1, 8), "prefill_ms": (256, 2)}


def session(bits: int, block: int, symmetric: bool, level: int) -> ort.InferenceSession:
    random = np.random.default_rng(0)
    nodes, values, source = [], [], "x"
    for index, (rows, columns) in enumerate(SHAPES):
        blocks = -(-columns // block)
        parts: dict[str, Any] = {
            f"codes{index}": random.integers(0, 256, (rows, blocks, block * bits // 8), dtype=np.uint8),
            f"scales{index}": random.random((rows, blocks), dtype=np.float32) * np.float32(0.01),
        }
        if not symmetric:
            parts[f"zeros{index}"] = random.integers(0, 256, (rows, -(-blocks * bits // 8)), dtype=np.uint8)
        values += [numpy_helper.from_array(array, name) for name, array in parts.items()]
        attributes = {"bits": bits, "block_size": block, "K": columns, "N": rows, "accuracy_level": level}
        nodes.append(
            helper.make_node("MatMulNBits", [source, *parts], [f"y{index}"], domain="com.microsoft", **attributes)
        )
        source = f"y{index}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SHAPES[0][1]])
    graph = helper.make_graph(
        nodes, "ffn", [x], [helper.make_tensor_value_info(source, TensorProto.FLOAT, None)], values
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    rows = []
    for level, bits, block, symmetric in product(LEVELS, BITS, BLOCKS, (True, False)):
        loaded = session(bits, block, symmetric, level)
        row: dict[str, Any] = {"bits": bits, "block": block, "symmetric": symmetric, "accuracy_level": level}
        for name, (tokens, runs) in CASES.items():
            x = np.random.default_rng(1).standard_normal((tokens, SHAPES[0][1]), dtype=np.float32)
            best = float("inf")
            for _ in range(runs):
                begin = time.perf_counter()
                loaded.run(None, {"x": x})
                best = min(best, time.perf_counter() - begin)
            row[name] = best * 1e3
        rows.append(row)
        print(json.dumps(row), flush=True)
    document = {
        "benchmark": "onnx_types",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
