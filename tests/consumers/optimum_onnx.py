"""Runs an export with optimum-onnx, in that package's own environment. Protocol: see transformers.mjs."""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

directory = sys.argv[1]
request = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(directory)
model = ORTModelForCausalLM.from_pretrained(directory, subfolder="onnx", file_name="model.onnx")
prompt = torch.tensor([request["prompt"]])
count = request["count"]
output = model.generate(
    input_ids=prompt,
    attention_mask=torch.ones_like(prompt),
    do_sample=False,
    max_new_tokens=count,
    min_new_tokens=count,
)
ids = [tokenizer(text)["input_ids"] for text in request["texts"]]
print(json.dumps({"ids": ids, "tokens": output[0, prompt.shape[1] :].tolist()}))
