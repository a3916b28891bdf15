"""AutoRound's GGUF export, in an environment of its own: nothing of this repository is imported.

    python auto_round_gguf.py MODEL TEXT OUT SCHEME ITERATIONS SAMPLES

SCHEME is ``gguf:q4_k_m`` or another of its GGUF schemes. Zero iterations are its optimized rounding to nearest with an
importance matrix of its own, which it recommends for GGUF; with 50 its tuning, at the learning rate that it recommends
for so few. It calibrates on windows of 512 tokens, spread over the text; by default it takes 128 of 2,048 from the hub.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 512
RATE_OF_FEW_STEPS = 5e-3


def main() -> None:
    model, text, out, scheme, iterations, samples = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    count = len(ids) // WINDOW
    windows = ids[: count * WINDOW].view(count, WINDOW)
    chosen = [windows[i * count // int(samples)][None] for i in range(min(count, int(samples)))]
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        tokenizer,
        scheme=scheme,
        dataset=chosen,
        nsamples=len(chosen),
        seqlen=WINDOW,
        iters=int(iterations),
        device_map="cpu",
        **({"lr": RATE_OF_FEW_STEPS} if int(iterations) else {}),
    )
    scratch = Path(out).with_suffix(".scratch")
    rounding.quantize_and_save(str(scratch), format=scheme)
    (written,) = scratch.rglob("*.gguf")
    shutil.move(written, Path(out) / "model.gguf")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
