"""The torch modules that a bundle needs beyond plain transformers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from acip_export.checkpoint import Checkpoint
from acip_export.errors import UnsupportedError


class FactoredLinear(nn.Module):
    """``y = up(down(x)) [+ base(x)] + bias`` in place of a linear layer.

    Attributes:
        down: (in -> rank), no bias. up: (rank -> out), no bias. base: (in -> out) or ``None``.
        bias: (out,) or ``None``.
    """

    def __init__(self, inputs: int, rank: int, outputs: int, base: bool, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        if base:
            self.weight = nn.Parameter(torch.empty(outputs, inputs))
        else:
            self.register_parameter("weight", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(outputs))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        if self.weight is not None:
            y = y + nn.functional.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


def causal_lm(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """An untrained model of ``config`` in evaluation mode, for ``load_state_dict``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    parsed = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model: nn.Module = AutoModelForCausalLM.from_config(parsed, dtype=dtype)  # type: ignore[no-untyped-call]
    return model.eval()


def load_causal_lm(checkpoint: Checkpoint, dtype: torch.dtype | Literal["auto"]) -> nn.Module:
    """The dense model with its weights, frozen, in evaluation mode; ``auto``: in the stored dtype.

    Raises:
        UnsupportedError: not a causal language model that transformers knows.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    # Progress is reported through callbacks; restored below, because this switch is the whole process's.
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype)
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedError(f"{checkpoint.path} cannot be loaded as a causal language model: {error}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return model.requires_grad_(False).eval()
