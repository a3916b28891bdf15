"""Model files of a few hundred bytes, written by each format's own library."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from safetensors.numpy import save_file

# name -> (rows, columns, ggml type); the numbers do not matter to any of these tests.
Tensors = dict[str, tuple[int, int, str]]

SMALL: Tensors = {
    "token_embd.weight": (8, 256, "F16"),
    "blk.0.attn_q.weight": (4, 256, "Q4_K"),
    "blk.1.attn_q.weight": (4, 256, "Q4_K"),
    "output.weight": (8, 256, "Q8_0"),
}


def write_gguf(file: Path, tensors: Tensors = SMALL, architecture: str = "llama", seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("small")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "héllo", "日本"])
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_array("test.flags", [True, False])
    for name, (rows, columns, type_name) in tensors.items():
        kind = gguf.GGMLQuantizationType[type_name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = generator.integers(0, 255, (rows, columns // block * size), dtype=np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def make_onnx(seed: int = 0) -> onnx.ModelProto:
    """Weights as raw data, as lists, in constants, in a branch, sparse, of four bits."""
    generator = np.random.default_rng(seed)
    raw = numpy_helper.from_array(generator.normal(size=(4, 8)).astype(np.float32), "layers.0.weight")
    listed = helper.make_tensor("layers.1.weight", TensorProto.FLOAT, [2, 3], [float(n) for n in range(6)])
    four_bits = helper.make_tensor("packed", TensorProto.INT4, [3, 3], list(range(-4, 5)))
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.arange(5)))
    inner = helper.make_graph(
        [helper.make_node("Identity", ["inside"], ["y1"])],
        "then",
        [],
        [helper.make_tensor_value_info("y1", TensorProto.FLOAT, [7])],
        [numpy_helper.from_array(np.ones(7, np.float32), "inside")],
    )
    branch = helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(3, np.float32), "sparse_values"),
        numpy_helper.from_array(np.array([0, 4, 9]), "sparse_indices"),
        [10],
    )
    graph = helper.make_graph(
        [constant, branch],
        "g",
        [helper.make_tensor_value_info("condition", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [7])],
        [raw, listed, four_bits],
        sparse_initializer=[sparse],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], producer_name="test")


def write_onnx(file: Path, external: bool = False, seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    model = make_onnx(seed)
    if external:
        external_data_helper.convert_model_to_external_data(
            model, location=f"{file.name}_data", size_threshold=16, convert_attribute=False
        )
    onnx.save(model, file)
    return file


def write_safetensors(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a.0.weight": np.ones((2, 3), np.float32), "a.1.weight": np.ones((2, 3), np.float16)}, file)
    return file
