"""Sample calibration text from the model itself, for those who may not use their data.

Plain ancestral sampling, temperature one: the text is distributed as the model believes text to be, which is what the
Fisher information averages over (:mod:`acip_export.ranking.statistics` draws its labels the same way). The idea of
calibrating on a model's own samples is that of LLM-QAT (arXiv 2305.17888).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from acip_export.io.kept_work import Work
from acip_export.progress import Clock, ProgressCallback, silent
from acip_export.ranking.stored_tensors import StoredTensors
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
    work: Work | None = None,
) -> PackedText:
    """Sample at least ``tokens`` tokens in windows of ``context``, on the CPU's generator.

    Args:
        first_token: what a window starts from, not part of it; ``None``: a random token, as for models without a
            beginning of text.
        work: that the text is sampled for; what it has of the text is not sampled again.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    count = -(-tokens // context)
    windows = torch.empty(count, context, dtype=torch.int64)
    work = work or Work()
    stored = StoredTensors(work.scratch("self"))
    begins = range(0, count, _SIDE_BY_SIDE)
    behind = min(count, _SIDE_BY_SIDE * sum(f"self {begin}" in work for begin in begins))
    clock = Clock("self", count, progress, tokens=context, done=behind)
    for begin in begins:
        rows = min(_SIDE_BY_SIDE, count - begin)
        if f"self {begin}" in work:
            windows[begin : begin + rows] = stored[str(begin)]
            generator.set_state(stored["generator"])
            continue
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
        stored[str(begin)], stored["generator"] = windows[begin : begin + rows], generator.get_state()
        work.finish(f"self {begin}")
        clock.advance(rows)
    return PackedText(windows, SELF, _identity(windows), count)


def _identity(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()
