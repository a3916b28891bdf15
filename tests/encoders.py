"""Tiny random encoders with a real WordPiece tokenizer, and lines of text for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, BertTokenizer

from acip_export.ranking import DataConfig
from tests.support import CORPUS

CLASSES = {"embedding": BertModel, "masked-lm": BertForMaskedLM, "classification": BertForSequenceClassification}
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CALIBRATION = DataConfig(statistics_tokens=4096, curve_tokens=1024, batch=4)


def make_encoder(
    directory: Path, kind: str = "embedding", pooling: str = "mean", normalize: bool = True, **overrides: Any
) -> Path:
    """Save a random BERT of ``kind`` with tokenizer and sentence-transformers' files; returns ``directory``."""
    torch.manual_seed(0)
    tokenizer = _word_pieces()
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
        "num_labels": 3,
        **overrides,
    }
    model = CLASSES[kind](BertConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights large enough to be missed; random norms and biases, since a forgotten one must show.
            parameter.add_(
                torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 1 / parameter.shape[1] ** 0.5)
            )
    model.save_pretrained(directory)
    file = directory / "tokenizer.json"
    tokenizer.save(str(file))
    BertTokenizer.from_pretrained(directory, tokenizer_file=str(file)).save_pretrained(directory)
    if kind == "embedding":
        steps = ["Transformer", "Pooling"] + ["Normalize"] * normalize
        modules = [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{step}" if i else "",
                "type": f"sentence_transformers.models.{step}",
            }
            for i, step in enumerate(steps)
        ]
        (directory / "modules.json").write_text(json.dumps(modules))
        (directory / "1_Pooling").mkdir(exist_ok=True)
        flags = {
            f"pooling_mode_{name}": pooling == name.partition("_")[0]
            for name in ("cls_token", "mean_tokens", "max_tokens")
        }
        (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **flags}))
    return directory


def _word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=320, special_tokens=list(SPECIALS), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def lines_of_text(file: Path, count: int = 300) -> Path:
    """Lines of 3 to 20 words in random order, nearly all of them different."""
    words = re.findall(r"\S+", " ".join(CORPUS))
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(words, generator.integers(3, 20))) for _ in range(count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
