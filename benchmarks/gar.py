"""Whether the gauge form of a factor pair pays in ONNX: ``up = P [I; T]`` leaves r(m + n - r) numbers to store.

    python -m benchmarks.gar --model samples/llama --scores llama.acip

Rows of ``up`` are chosen by pivoted QR, ``down' = up[chosen] down``, ``T = up[others] up[chosen]^-1``. In the graph:
MatMul with ``down'``, MatMul with T, Concat, Gather, against two MatMulNBits. Measured: bytes; predicted loss of
rounding; largest entry of T; speed in onnxruntime of one layer. Writes benchmarks/gar.json.
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
import onnx
import onnxruntime as ort
import scipy.linalg
import torch
from onnx import TensorProto, helper, numpy_helper

from acip_export.artifacts.scores import load_scores
from acip_export.lowrank.components import whitened_components
from acip_export.lowrank.whitening import Whitening
from acip_export.materialization.factors import Norm, Pair, inner_importance
from acip_export.materialization.refit import refit
from acip_export.model.checkpoint import Checkpoint
from acip_export.rounding.quantizer import InputMoments
from acip_export.weight_types import WeightType, weight_type
from converters.onnx.converter import round_trip
from converters.onnx.quantize import quantize

_SUMS = ("dense", "pair", "pair_as_ranked_loss", "pair_loss", "gar", "gar_loss")
RANKS, TYPES = (64, 96, 128), ("f32", "int8", "int4")
# rows, columns, rank of the layers that are timed, and tokens at once
SPEED_SHAPES, TOKENS = ((1024, 1024, 384), (2816, 1024, 512)), (1, 128)


def gauge(pair: Pair) -> tuple[torch.Tensor, torch.Tensor, np.ndarray[Any, Any]]:
    """``T`` (out - r, r), ``down'`` (r, in), and the order of the rows in which ``up`` is ``[I; T]``."""
    rank = len(pair.down)
    _, _, order = scipy.linalg.qr(pair.up.double().numpy().T, pivoting=True, mode="economic")
    chosen, others = pair.up[order[:rank]].double(), pair.up[order[rank:]].double()
    return torch.linalg.solve(chosen.T, others.T).T.float(), (chosen @ pair.down.double()).float(), order


def errors(args: argparse.Namespace) -> list[dict[str, Any]]:
    checkpoint, scores = Checkpoint.open(args.model), load_scores(args.scores)
    sums: dict[tuple[int, str], dict[str, float]] = {}
    for name, module in scores.modules.items():
        if not any(f".{layer}." in name for layer in args.layers):
            continue
        weight = checkpoint.read(f"{name}.weight").float()
        norm = Norm.of(module, scores.second_moments, weight)
        basis = whitened_components(weight, Whitening.of(norm.inputs), Whitening.of(norm.gradients))
        inputs = InputMoments(torch.from_numpy(module.input_moment))
        rows, columns = weight.shape
        for rank in RANKS:
            if rank >= min(rows, columns):
                continue
            pair = Pair(basis.up[:, :rank], basis.down[:rank])
            tall, down, order = gauge(pair)
            for kind in TYPES:
                form = weight_type("onnx", kind)
                rounded = round_trip(down, kind, inputs)
                low = round_trip(tall, kind, InputMoments(inner_importance(rounded, norm.inputs)))
                product = torch.empty(rows, columns)
                product[order.copy()] = torch.cat([rounded, low @ rounded])
                found = sums.setdefault((rank, kind), dict.fromkeys(_SUMS, 0.0))
                found["largest_entry_of_t"] = max(found.get("largest_entry_of_t", 0.0), float(tall.abs().max()))
                found["dense"] += form.nbytes(rows, columns)
                found["pair"] += form.nbytes(rows, rank) + form.nbytes(rank, columns)
                # The order of the rows is stored as int32.
                found["gar"] += form.nbytes(rows - rank, rank) + form.nbytes(rank, columns) + 4 * rows
                found["gar_loss"] += norm.loss(product - pair.up @ pair.down)
                plain = refit(pair, norm, inputs, form, form, round_trip, rounds=0, rotate=False)
                found["pair_as_ranked_loss"] += plain.loss
                found["pair_loss"] += refit(pair, norm, inputs, form, form, round_trip).loss
    return [{"rank": rank, "type": kind, **found} for (rank, kind), found in sums.items()]


def _matrix(name: str, rows: int, columns: int, form: WeightType, source: str, out: str) -> tuple[list[Any], list[Any]]:
    weight = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    if form.is_float:
        return [helper.make_node("MatMul", [source, name], [out])], [numpy_helper.from_array(weight.T.copy(), name)]
    quantized = quantize(weight, form)
    node = helper.make_node(
        "MatMulNBits",
        [source, f"{name}q", f"{name}s"],
        [out],
        domain="com.microsoft",
        bits=form.code_bits,
        block_size=form.block,
        K=columns,
        N=rows,
        accuracy_level=4,
    )
    return [node], [
        numpy_helper.from_array(quantized.codes, f"{name}q"),
        numpy_helper.from_array(quantized.scales, f"{name}s"),
    ]


def _session(shape: tuple[int, int, int], form: WeightType, gar: bool) -> ort.InferenceSession:
    rows, columns, rank = shape
    nodes, values = _matrix("down", rank, columns, form, "x", "h")
    more, numbers = _matrix("up", rows - rank if gar else rows, rank, form, "h", "t" if gar else "y")
    nodes, values = nodes + more, values + numbers
    if gar:
        order = np.random.default_rng(1).permutation(rows).astype(np.int32)
        nodes += [
            helper.make_node("Concat", ["h", "t"], ["c"], axis=1),
            helper.make_node("Gather", ["c", "order"], ["y"], axis=1),
        ]
        values.append(numpy_helper.from_array(order, "order"))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])],
        values,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 10
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def speed() -> list[dict[str, Any]]:
    """Best of many, the two forms taking turns: the machine is shared."""
    found = []
    for shape in SPEED_SHAPES:
        for kind in TYPES:
            sessions = [_session(shape, weight_type("onnx", kind), gar) for gar in (False, True)]
            for tokens in TOKENS:
                x = np.random.default_rng(2).standard_normal((tokens, shape[1])).astype(np.float32)
                best = [float("inf")] * 2
                for _ in range(60):
                    for index, session in enumerate(sessions):
                        begin = time.perf_counter()
                        session.run(None, {"x": x})
                        best[index] = min(best[index], time.perf_counter() - begin)
                found.append(
                    {"shape": shape, "type": kind, "tokens": tokens, "pair_us": best[0] * 1e6, "gar_us": best[1] * 1e6}
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "gar.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    document = {
        "benchmark": "gar",
        "model": args.model.name,
        "layers": args.layers,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "numpy")},
        "errors": errors(args),
        "speed": speed(),
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    for row in (*document["errors"], *document["speed"]):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
