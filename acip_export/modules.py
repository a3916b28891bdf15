"""The torch modules that a bundle needs beyond plain transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
