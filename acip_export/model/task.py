"""What a model is for. One word, which score file, plan and report store, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

# causal: generates text. embedding: one vector a text. classification: logits a text. masked-lm: logits a token.
EncoderKind = Literal["embedding", "classification", "masked-lm"]
Task = Literal["causal"] | EncoderKind

# What a loss above the dense model is counted in.
LOSS_UNITS: Mapping[Task, str] = {
    "causal": "nats per token",
    "embedding": "cosine distance per text",
    "classification": "nats per text",
    "masked-lm": "nats per masked token",
}
