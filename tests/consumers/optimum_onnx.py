"""Runs exports with optimum-onnx, in that package's own environment. Protocol: see transformers.mjs.

``cache_bytes``: of the KV cache as optimum holds it at the end.
"""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def answer(directory: str, texts: list[str], prompt: list[int], count: int) -> dict[str, object]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = ORTModelForCausalLM.from_pretrained(directory, subfolder="onnx", file_name="model.onnx")
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        return_dict_in_generate=True,
    )
    # Of every token but the last, which was never given to the model.
    cache = sum(tensor.nbytes for layer in output.past_key_values for tensor in layer)
    return {
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "tokens": output.sequences[0, len(prompt) :].tolist(),
        "cache_bytes": cache,
    }


request = json.load(sys.stdin)
print(json.dumps([answer(directory, **request) for directory in sys.argv[1:]]))
