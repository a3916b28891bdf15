"""Random models of real shapes, for measurements that do not depend on what the numbers are.

    python -m benchmarks.random_model 1b DIRECTORY

bfloat16 weights and a byte-level BPE tokenizer of real size: its merges join random pairs, as many and about as long as
a trained one's. Written tensor by tensor; a model of a billion parameters takes 2.2 GB of disk and little memory.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from acip_export.io.atomic import SafetensorsWriter
from acip_export.model.checkpoint import Checkpoint

# Llama 3's, without its special cases for contractions: llama.cpp knows it as "llama-bpe".
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LONGEST_TOKEN = 16

# One that tests can afford; GPT-2's proportions with 122 million parameters; Llama-3.2-1B.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "100m": {
        "vocab_size": 49152,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}


def random_tokenizer(vocabulary: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """A working byte-level BPE tokenizer of ``vocabulary`` tokens, two of them special."""
    generator = random.Random(seed)
    specials = ["<|begin_of_text|>", "<|end_of_text|>"]
    tokens = dict.fromkeys([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    pool = list(tokens)[2:]
    merges = []
    while len(tokens) < vocabulary:
        # Short tokens are joined more often, as in trained vocabularies; about seven bytes each in the end.
        left, right = pool[int(len(pool) * generator.random() ** 3)], pool[int(len(pool) * generator.random() ** 3)]
        if len(left + right) <= _LONGEST_TOKEN and left + right not in tokens:
            tokens[left + right] = None
            pool.append(left + right)
            merges.append((left, right))
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1], clean_up_tokenization_spaces=False
    )


def write_random_model(directory: Path, shape: dict[str, Any], context: int = 4096, tied: bool = True) -> Checkpoint:
    """Config, tokenizer and random bfloat16 weights; nothing but one tensor is in memory."""
    directory.mkdir(parents=True)
    random_tokenizer(shape["vocab_size"]).save_pretrained(directory)
    settings = {
        **shape,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "architectures": ["LlamaForCausalLM"],
    }
    config = AutoConfig.for_model("llama", **settings)
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {name: tuple(p.shape) for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(
        directory / "model.safetensors", {name: ("BF16", s) for name, s in tensors.items()}, {"format": "pt"}
    ) as writer:
        for name, extents in tensors.items():
            weight = torch.ones(extents)
            if len(extents) == 2:
                weight = torch.randn(extents, generator=generator) / extents[1] ** 0.5
            writer.write(name, weight.bfloat16().view(torch.int16).numpy().data.cast("B"))
    return Checkpoint.open(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    checkpoint = write_random_model(arguments.directory, SHAPES[arguments.shape])
    print(json.dumps({"parameters": checkpoint.weight_bytes // 2, "path": str(checkpoint.path)}))


if __name__ == "__main__":
    main()
