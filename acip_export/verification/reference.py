"""The reference that exports are compared with: a bundle or a dense model in PyTorch, float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from acip_export.artifacts.bundle import load_bundle
from acip_export.artifacts.names import MANIFEST_FILE
from acip_export.formats.session import Logits, Windows
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import load_causal_lm
from acip_export.rounding import RoundTrip

if TYPE_CHECKING:
    from torch import nn


class TorchReference:
    """Opens a bundle directory, or any Hugging Face model directory.

    Args:
        round_trip: as :func:`acip_export.artifacts.bundle.load_bundle`: a bundle's matrices are rounded as its
            export has them.

    Attributes:
        model: float32, evaluation mode, on the CPU.
    """

    def __init__(self, path: Path, round_trip: RoundTrip | None = None) -> None:
        self.path = path
        self.model: nn.Module = (
            load_bundle(path, round_trip)
            if (path / MANIFEST_FILE).is_file()
            else load_causal_lm(Checkpoint.open(path), torch.float32)
        )

    @torch.no_grad()
    def logits(self, windows: Windows) -> Iterator[Logits]:
        """As :meth:`RuntimeSession.logits`."""
        for window in windows:
            yield self.model(input_ids=torch.from_numpy(window)[None]).logits[0].float().numpy()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """As :meth:`RuntimeSession.greedy`."""
        return self._continue(prompt, count, None)

    def sample(self, count: int, tokens: int, seed: int) -> Windows:
        """``count`` windows of text drawn from the model itself: (count, tokens) int64."""
        config: Any = self.model.config
        start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
        first = int(start[0] if isinstance(start, list) else start or 0)
        generator = torch.Generator().manual_seed(seed)
        rows = [[first, *self._continue([first], tokens - 1, generator)] for _ in range(count)]
        return np.array(rows, np.int64)

    @torch.no_grad()
    def _continue(self, prompt: list[int], count: int, generator: torch.Generator | None) -> list[int]:
        new: list[int] = []
        cache, ids = None, torch.tensor([prompt])
        while len(new) < count:
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, last = output.past_key_values, output.logits[0, -1].float()
            token = last.argmax() if generator is None else last.softmax(0).multinomial(1, generator=generator)[0]
            new.append(int(token))
            ids = token.view(1, 1)
        return new
