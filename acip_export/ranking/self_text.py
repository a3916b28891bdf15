"""Sample calibration text from the model itself, for those who may not use their data.

Plain ancestral sampling, temperature one: the text is distributed as the model believes text to be, which is what the
Fisher information averages over (:mod:`acip_export.ranking.statistics` draws its labels the same way). The idea of
calibrating on a model's own samples is that of LLM-QAT (arXiv 2305.17888).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from acip_export.progress import Clock, ProgressCallback, silent
from acip_export.text.packing import PackedText

SELF = "self"
# Sequences that are sampled side by side: enough to keep the matrix products wide.
_SIDE_BY_SIDE = 64


@torch.no_grad()
def sample_text(
    model: nn.Module,
    first_token: int | None,
    vocabulary: int,
    context: int,
    tokens: int,
    seed: int,
    progress: ProgressCallback = silent,
) -> PackedText:
    """Sample at least ``tokens`` tokens in windows of ``context``, on the CPU's generator.

    Args:
        first_token: what a window starts from, not part of it; ``None``: a random token, as for models without a
            beginning of text.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    count = -(-tokens // context)
    windows = torch.empty(count, context, dtype=torch.int64)
    clock = Clock("self", count, progress, tokens=context)
    for begin in range(0, count, _SIDE_BY_SIDE):
        rows = min(_SIDE_BY_SIDE, count - begin)
        if first_token is None:
            last = torch.randint(vocabulary, (rows, 1), generator=generator)
        else:
            last = torch.full((rows, 1), first_token)
        cache = None
        for place in range(context):
            output = model(input_ids=last.to(device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            last = torch.multinomial(output.logits[:, -1].float().softmax(-1).cpu(), 1, generator=generator)
            windows[begin : begin + rows, place] = last[:, 0]
        clock.advance(rows)
    return PackedText(windows, SELF, _identity(windows), count)


def _identity(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()
