"""Whether layers that share their input gain from one first factor that makes all their ranks (ONNX, int4, level 4).

    python -m benchmarks.stacked

q, k and v of a layer read the same vector, and so do gate and up. Three graphs of each group take turns in onnxruntime:
dense (one MatMulNBits a layer), pairs (two each), stacked (one MatMulNBits for all ranks, Split, the second factors).
Ranks are those at which a pair has 0.3, 0.5 and 0.7 of the dense bytes; the best of many rounds, because the machine is
shared. Writes benchmarks/stacked.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from acip_export.weight_types import WeightType, weight_type
from converters.onnx.quantize import quantize

RESULT = Path(__file__).parent / "stacked.json"
# (rows of the layers, columns)
GROUPS = {
    "1B qkv": ((2048, 512, 512), 2048),
    "1B gate and up": ((8192, 8192), 2048),
    "135M qkv": ((576, 192, 192), 576),
    "135M gate and up": ((1536, 1536), 576),
}
RATIOS, TOKENS = (0.3, 0.5, 0.7), (1, 256)
FORMS = ("dense", "pairs", "stacked")
# Seconds that one case is measured for.
TIME = 4.0


def ranks_of(rows: tuple[int, ...], columns: int, ratio: float, block: int) -> tuple[int, ...]:
    """Multiples of the block at which a pair has about ``ratio`` of the dense layer's bytes."""
    return tuple(max(block, round(ratio * n * columns / (n + columns) / block) * block) for n in rows)


class _Graph:
    def __init__(self, form: WeightType) -> None:
        self.form = form
        self.nodes: list[Any] = []
        self.values: list[Any] = []

    def product(self, name: str, rows: int, columns: int, source: str, out: str) -> None:
        weight = np.random.default_rng(len(self.nodes)).standard_normal((rows, columns), dtype=np.float32)
        quantized = quantize(weight, self.form)
        self.values += [
            numpy_helper.from_array(quantized.codes, f"{name}q"),
            numpy_helper.from_array(quantized.scales, f"{name}s"),
        ]
        attributes = {"bits": self.form.code_bits, "block_size": self.form.block, "K": columns, "N": rows}
        inputs = [source, f"{name}q", f"{name}s"]
        self.nodes.append(
            helper.make_node("MatMulNBits", inputs, [out], domain="com.microsoft", accuracy_level=4, **attributes)
        )

    def session(self, columns: int, outputs: int) -> ort.InferenceSession:
        infos = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])
        graph = helper.make_graph(self.nodes, "group", [x], infos, self.values)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def build(kind: str, rows: tuple[int, ...], columns: int, ranks: tuple[int, ...], form: WeightType) -> Any:
    graph = _Graph(form)
    if kind == "stacked":
        graph.product("down", sum(ranks), columns, "x", "all")
        graph.values.append(numpy_helper.from_array(np.array(ranks, np.int64), "ranks"))
        graph.nodes.append(helper.make_node("Split", ["all", "ranks"], [f"h{i}" for i in range(len(ranks))], axis=1))
    for i, (n, rank) in enumerate(zip(rows, ranks, strict=True)):
        if kind == "dense":
            graph.product(f"w{i}", n, columns, "x", f"y{i}")
            continue
        if kind == "pairs":
            graph.product(f"down{i}", rank, columns, "x", f"h{i}")
        graph.product(f"up{i}", n, rank, f"h{i}", f"y{i}")
    return graph.session(columns, len(rows))


def measure(rows: tuple[int, ...], columns: int, ratio: float, form: WeightType) -> list[dict[str, Any]]:
    ranks = ranks_of(rows, columns, ratio, form.block)
    sessions = {kind: build(kind, rows, columns, ranks, form) for kind in FORMS}
    dense = sum(form.nbytes(n, columns) for n in rows)
    pairs = sum(form.nbytes(n, rank) + form.nbytes(rank, columns) for n, rank in zip(rows, ranks, strict=True))
    found = []
    for tokens in TOKENS:
        x = np.random.default_rng(2).standard_normal((tokens, columns), dtype=np.float32)
        best = dict.fromkeys(FORMS, float("inf"))
        until = time.perf_counter() + TIME
        while time.perf_counter() < until:
            for kind, session in sessions.items():
                begin = time.perf_counter()
                session.run(None, {"x": x})
                best[kind] = min(best[kind], time.perf_counter() - begin)
        row = {"ranks": ranks, "bytes_ratio": pairs / dense, "tokens": tokens}
        found.append({**row, **{f"{kind}_us": best[kind] * 1e6 for kind in FORMS}})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="int4")
    args = parser.parse_args()
    form = weight_type("onnx", args.type)
    rows = []
    for name, (layers, columns) in GROUPS.items():
        for ratio in RATIOS:
            for row in measure(layers, columns, ratio, form):
                rows.append({"group": name, "ratio": ratio, **row})
                print(json.dumps(rows[-1]), flush=True)
    document = {
        "benchmark": "stacked",
        "type": args.type,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
