"""Runs exports with nothing but onnxruntime, numpy and tokenizers. Protocol: see transformers.mjs.

The KV cache starts empty, comes out of every step and goes into the next one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def answer(directory: Path, texts: list[str], prompt: list[int], count: int) -> dict[str, object]:
    session = onnxruntime.InferenceSession(str(directory / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    numbers = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    cache = {
        node.name: np.empty((1, node.shape[1], 0, node.shape[3]), numbers[node.type])
        for node in session.get_inputs()
        if node.name.startswith("past_key_values.")
    }
    outputs = ["logits", *(name.replace("past_key_values.", "present.") for name in cache)]
    tokens, pending = list[int](), prompt
    while len(tokens) < count:
        length = len(prompt) + len(tokens)
        feeds = {
            "input_ids": np.array([pending]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - len(pending), length)[None],
        }
        logits, *present = session.run(outputs, {**feeds, **cache})
        cache = dict(zip(cache, present, strict=True))
        pending = [int(logits[0, -1].argmax())]
        tokens += pending
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return {"ids": [tokenizer.encode(text).ids for text in texts], "tokens": tokens}


request = json.load(sys.stdin)
print(json.dumps([answer(Path(directory), **request) for directory in sys.argv[1:]]))
