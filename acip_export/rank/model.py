"""The model that is ranked: loaded, checked, and asked for the names of its parts."""

from __future__ import annotations

import torch
from torch import nn

from acip_export.checkpoint import Checkpoint
from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.modules import load_dense


def load_model(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """The dense model with frozen weights: float32 on CPUs (few have fast bfloat16), as stored elsewhere.

    Raises:
        UnsupportedError: neither an encoder nor a causal language model, or linear layers that are not ``nn.Linear``.
        CheckpointError: a linear weight that is zero or not finite.
    """
    model = load_dense(checkpoint, torch.float32 if device.type == "cpu" else "auto").to(device)
    if not checkpoint.linear_modules:
        raise UnsupportedError(
            f"{checkpoint.path} has no linear layers in numbered blocks, so there is nothing to rank"
        )
    for name, shape in checkpoint.linear_modules.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != shape:
            found = "missing from the loaded model" if module is None else f"a {type(module).__name__}"
            raise UnsupportedError(f"{name} is {found}, expected an nn.Linear of shape {shape}; it cannot be ranked")
        if not torch.isfinite(module.weight).all():
            raise CheckpointError(f"{name}.weight holds NaN or infinity; the model cannot be ranked")
        if not module.weight.any():
            raise CheckpointError(f"{name}.weight is all zeros; the model was not saved, or not trained, completely")
    return model


def embedding_names(model: nn.Module) -> tuple[str, str | None]:
    """Module names of the input embedding and the head over the vocabulary, if there is one."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    return names[id(embedding)], names.get(id(head))
