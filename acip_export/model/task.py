"""Name what a model is for: one word, which score file, plan and report store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

# causal: generates text. embedding: one vector per text. classification: logits per text. masked-lm: logits per token.
EncoderKind = Literal["embedding", "classification", "masked-lm"]
Task = Literal["causal"] | EncoderKind

# The unit of a loss above the dense model.
LOSS_UNITS: Mapping[Task, str] = {
    "causal": "nats per token",
    "embedding": "cosine distance per text",
    "classification": "nats per text",
    "masked-lm": "nats per masked token",
}
