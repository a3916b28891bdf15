"""Run an export with transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from acip_export.artifacts.plan import Serving
from acip_export.artifacts.report import Speed
from acip_export.formats.session import Logits, Windows
from tinyformat.files import read  # type: ignore[import-not-found]


class TinySession:
    """See :class:`acip_export.formats.session.RuntimeSession`."""

    name = f"pytorch {torch.__version__}"

    def __init__(self, export: Path, serving: Serving) -> None:
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(export), dtype=torch.float32)
        self.model.load_state_dict(read(export), strict=False)
        self.model.tie_weights()
        self.model.eval()
        self.batch = serving.prompt_batch

    def logits(self, windows: Windows) -> Iterator[Logits]:
        for window in windows:
            with torch.no_grad():
                found: Logits = self.model(torch.from_numpy(np.asarray(window))[None]).logits[0].float().numpy()
            yield found

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(next(self.logits(np.array([tokens])))[-1].argmax()))
        return tokens[len(prompt) :]

    def tokenize(self, text: str) -> None:
        """Return nothing: there is no tokenizer in the files."""

    def speed(self, prompt: list[int], new_tokens: int) -> Speed:
        start = time.perf_counter()
        next(self.logits(np.array([prompt])))
        middle = time.perf_counter()
        self.greedy(prompt, 2)
        taken = max(time.perf_counter() - middle, 1e-9)
        return Speed(len(prompt) / max(middle - start, 1e-9), 2 / taken, len(prompt), new_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self.model
