"""The dense model in PyTorch, as an export's conversation is compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from acip_export.artifacts.plan import Serving
from acip_export.formats.session import Logits
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import load_causal_lm
from acip_export.text.tokens import TextTokens


class DenseSession:
    """A model directory, in the precision that it is stored in; a :class:`~acip_export.formats.session.ChatSession`."""

    def __init__(self, directory: Path, serving: Serving, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._model: Any = load_causal_lm(Checkpoint.open(directory), "auto")
        self._batch = serving.prompt_batch
        self._cache: Any = None
        self._position = 0
        self._texts = TextTokens(directory)
        self.name = f"PyTorch {torch.__version__.partition('+')[0]}"
        self.tokens, self.encode, self.stream = self._texts.special, self._texts.encode, self._texts.stream
        generation: Any = self._model.generation_config
        self.ends = self._texts.ends | _ids(generation.eos_token_id)

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int]) -> Logits:
        """See :class:`acip_export.formats.session.ChatSession`."""
        for start in range(0, len(tokens), self._batch):
            ids = torch.tensor([list(tokens[start : start + self._batch])])
            output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = output.past_key_values
        self._position += len(tokens)
        last: Logits = output.logits[0, -1].float().numpy()
        return last

    def rewind(self, position: int) -> int:
        """See :class:`acip_export.formats.session.ChatSession`."""
        if position != self._position:
            # A cache of sliding windows has lost what it would need.
            sliding = any(getattr(layer, "is_sliding", False) for layer in getattr(self._cache, "layers", ()))
            if position == 0 or sliding:
                self._cache, position = None, 0
            else:
                self._cache.crop(position - self._position)  # negative: how many to forget
            self._position = position
        return position

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._model = self._cache = None


def _ids(found: Any) -> frozenset[int]:
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])
