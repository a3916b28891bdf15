"""One small whole file of every kind that is read, for fuzzing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import onnx

from tests.artifacts import examples
from tests.artifacts.test_mutations import _lock
from tests.gguf.tokenizers import sentencepiece_model
from tests.reports import REPORT
from tests.support import make_tokenizer


def write_seeds(place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    weight = onnx.helper.make_tensor("w", 1, (4, 4), bytes(64), raw=True)
    node = onnx.helper.make_node("Constant", [], ["c"], value=weight)
    graph = onnx.helper.make_graph([node], "g", [], [], [weight])
    header = b'{"__metadata__":{"a":"b"},"t":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    tensor = struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 32, 8, 0)
    keys = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQQ", 9, 8, 1, 3) + b"abc"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + keys + tensor
    examples.write_scores(place / "seed.acip") if not (place / "seed.acip").exists() else None
    tokenizer = make_tokenizer(vocabulary=300).backend_tokenizer.to_str()
    config = {"model_type": "llama", "hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    files: dict[str, str | bytes] = {
        "seed.gguf": head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(34),
        "seed.onnx": onnx.helper.make_model(graph).SerializeToString(),
        "seed.safetensors": struct.pack("<Q", len(header)) + header + bytes(16),
        "seed.plan.json": json.dumps(examples.PLAN.to_json()),
        "seed.report.json": json.dumps(REPORT.to_json()),
        "seed.lock.json": json.dumps(_lock()),
        "seed.check.toml": examples.CHECK,
        "seed.devices.toml": examples.DEVICES,
        "seed.config.json": json.dumps(config),
        "seed.tokenizer.json": tokenizer,
        "seed.model": sentencepiece_model("bpe"),
        "seed.jsonl": '{"text": "some words"}\n{"messages": [{"role": "user", "content": "x"}]}\n',
        "seed.csv": 'n,text\n1,"some, words"\n',
    }
    for name, content in files.items():
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return place
