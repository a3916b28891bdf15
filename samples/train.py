"""Train a sample model from the source text of Python's own library.

    python -m samples.train --arch llama --out samples/llama

The models that this repository ships were made by exactly this script; their ``training.json`` records the run. A run
takes about half an hour on two cores and a few minutes on a GPU. The script ends with the check that makes a sample
worth having: cutting every linear layer to half its parameters by plain SVD must hurt (see ``assert_compressible``).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from samples.corpus import read_corpus

CONTEXT = 512
VOCABULARY = 2048
SMALLEST_SVD_DAMAGE = 0.30

# The split patterns of the real families, so that llama.cpp's own pre-tokenizers apply to the exported files.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}


def train_tokenizer(arch: str, documents: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens, split pattern and normaliser of the real family."""
    llama = arch == "llama"
    specials = ["<|begin_of_text|>", "<|end_of_text|>"] if llama else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(ignore_merges=llama))
    if not llama:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT if llama else _QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if llama:
        bos = specials[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=specials[0] if llama else None,
        eos_token=specials[1] if llama else specials[0],
        pad_token=specials[1] if llama else specials[0],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(arch: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = (LlamaConfig if arch == "llama" else Qwen3Config)(**_SHAPE, **ids)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pack(tokenizer: PreTrainedTokenizerFast, documents: tuple[str, ...]) -> Tensor:
    """Token ids (int64, 1-D) of the documents in order, each closed by the end-of-text token."""
    pieces = tokenizer(list(documents), verbose=False)["input_ids"]
    return torch.tensor([token for ids in pieces for token in [*ids, tokenizer.eos_token_id]])


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, context: int = CONTEXT) -> float:
    """Teacher-forced perplexity over non-overlapping windows of ``context`` tokens."""
    model.eval()
    device = next(model.parameters()).device
    windows = ids[: len(ids) // context * context].view(-1, context)
    total = 0.0
    for batch in windows.split(16):
        logits = model(input_ids=batch.to(device)).logits.float()[:, :-1]
        labels = batch[:, 1:].to(device)
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    model.train()
    return math.exp(total / (len(windows) * (context - 1)))


def train(model: PreTrainedModel, ids: Tensor, held_out: Tensor, args: argparse.Namespace) -> list[dict[str, float]]:
    """Muon for the matrices, AdamW for embeddings and norms; constant rate for half the run, then linear to 3 %."""
    device = torch.device(args.device)
    nn.Module.to(model, device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, max(0.03, 2 * (1 - step / args.steps))))
        for o in optimizers
    ]
    forward = torch.compile(model) if args.compile else model
    generator = torch.Generator().manual_seed(args.seed)
    log: list[dict[str, float]] = []
    started = time.perf_counter()
    model.train()
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(ids) - CONTEXT, (args.batch,), generator=generator).tolist()
        batch = torch.stack([ids[s : s + CONTEXT] for s in starts]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        if step % max(1, args.steps // 20) == 0 or step == args.steps:
            seconds = time.perf_counter() - started
            tokens = step * args.batch * CONTEXT
            log.append(
                {
                    "step": step,
                    "tokens": tokens,
                    "train_loss": round(loss.item(), 4),
                    "held_out_perplexity": round(perplexity(model, held_out[: 64 * CONTEXT]), 3),
                    "seconds": round(seconds, 1),
                }
            )
            print(json.dumps(log[-1]), flush=True)
    return log


def assert_compressible(model: PreTrainedModel, held_out: Tensor) -> dict[str, float]:
    """Cut every linear layer to half its parameters by plain SVD and demand that perplexity rises by 30 %.

    An undertrained model fails here, and every quality table made from it would be empty.
    """
    dense = perplexity(model, held_out)
    cut = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    cut.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, module in cut.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                rank = int(0.5 * module.weight.numel() / sum(module.weight.shape))
                u, s, vt = torch.linalg.svd(module.weight.double(), full_matrices=False)
                module.weight.copy_((u[:, :rank] * s[:rank]) @ vt[:rank])
    halved = perplexity(cut, held_out)
    if halved < (1 + SMALLEST_SVD_DAMAGE) * dense:
        raise SystemExit(f"undertrained: uniform SVD to half takes perplexity from {dense:.2f} to only {halved:.2f}")
    return {"dense": round(dense, 4), "uniform_svd_half": round(halved, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=["llama", "qwen3"], default="llama")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast; faster where the device has bf16 units")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    texts = read_corpus()
    tokenizer = train_tokenizer(args.arch, texts.train)
    ids = pack(tokenizer, texts.train)
    held_out = pack(tokenizer, texts.evaluation)
    model = make_model(args.arch, tokenizer)
    print(
        f"{model.num_parameters():,} parameters, {len(ids):,} training tokens, {len(held_out):,} held out", flush=True
    )
    log = train(model, ids, held_out, args)

    nn.Module.to(model, "cpu", torch.bfloat16)
    reloaded = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    reloaded.load_state_dict(model.state_dict())
    figures = assert_compressible(reloaded, held_out)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "arch": args.arch,
        "parameters": model.num_parameters(),
        "corpus": {
            "source": f"CPython {platform.python_version()} standard library",
            "train_tokens": len(ids),
            "held_out_tokens": len(held_out),
        },
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "device")},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": args.device},
        "perplexity": figures,
        "log": log,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    shared = args.out.parent / "text"
    shared.mkdir(exist_ok=True)
    (shared / "calibration.txt").write_text("\n".join(texts.calibration), encoding="utf-8")
    (shared / "evaluation.txt").write_text("\n".join(texts.evaluation), encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
