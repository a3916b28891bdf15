"""Runs exported encoders with optimum-onnx, in that package's own environment. Protocol: see encoder.mjs.

``outputs`` are those that optimum's classes hand on, and there is no pipeline.
"""

import json
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTModelForMaskedLM, ORTModelForSequenceClassification
from transformers import AutoTokenizer

KINDS = {
    "ForSequenceClassification": ORTModelForSequenceClassification,
    "ForMaskedLM": ORTModelForMaskedLM,
    "Model": ORTModelForFeatureExtraction,
}


def answer(directory: str, texts: list[str]) -> dict[str, object]:
    architecture = json.loads((Path(directory) / "config.json").read_text())["architectures"][0]
    kind = next(kind for ending, kind in KINDS.items() if architecture.endswith(ending))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = kind.from_pretrained(directory, subfolder="onnx", file_name="model.onnx")
    found = model(**tokenizer(texts, padding=True, return_tensors="pt"))
    return {
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "outputs": {name: tensor.tolist() for name, tensor in found.items()},
    }


texts = json.load(sys.stdin)["texts"]
print(json.dumps([answer(directory, texts) for directory in sys.argv[1:]]))
