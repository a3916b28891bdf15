"""Load the model that is ranked, check it, and find its embedding and head."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.io.heap import give_back
from acip_export.machine import fast_bfloat16
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import load_dense
from acip_export.ranking.config import Precision
from acip_export.ranking.masked_ops import frozen_linear

# Up to here float32 weights take at most 400 MB, and the measured curve starts exactly at the dense model.
FLOAT32_WEIGHTS = 100_000_000
# From here on activations are recomputed rather than kept, unless --no-recompute-activations says otherwise.
_RECOMPUTED_WEIGHTS = 1_000_000_000


class StoredLinear(nn.Linear):
    """A linear layer whose frozen weight keeps its stored dtype; it is widened to the input's for each product."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.weight.requires_grad:  # another's, in the place of the frozen one
            return nn.functional.linear(input, self.weight, self.bias)
        return frozen_linear(input, self.weight, self.bias)


def linear_weights(checkpoint: Checkpoint) -> int:
    """Count the weights of all linear layers together."""
    return sum(out * inputs for out, inputs in checkpoint.linear_modules.values())


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    precision: Precision = "float32",
    home: torch.device | None = None,
) -> nn.Module:
    """Load the dense model, with frozen weights.

    Args:
        checkpoint: the model.
        device: the device that computes.
        precision: the dtype of the ranked layers' weights and of the factors made from them: ``float32``, or ``model``
            for the dtype of the file. ``auto`` is ``float32`` on CPUs for models of up to 1e8 weights, else ``model``.
            Products are made in that dtype, but in float32 on CPUs that have no instructions for it, and for encoders
            on any CPU: a cosine distance is a small difference of large numbers.
        home: the device that holds the weights; ``None`` for ``device``.

    Raises:
        UnsupportedError: the model is neither an encoder nor a causal language model, or has linear layers that are
            not ``nn.Linear``.
        CheckpointError: a linear weight is all zeros, or a tensor is not finite.
    """
    for name in checkpoint.tensors.keys() - {f"{module}.weight" for module in checkpoint.linear_modules}:
        checkpoint.read(name)  # refuses what is not finite; linear weights are read below
    small = linear_weights(checkpoint) <= FLOAT32_WEIGHTS
    if precision == "auto":
        precision = "float32" if device.type == "cpu" and small else "model"
    model = load_dense(checkpoint, torch.float32 if precision == "float32" else "auto").to(home or device)
    for name, shape in checkpoint.linear_modules.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != shape:
            state = "missing from the loaded model" if module is None else f"a {type(module).__name__}"
            raise UnsupportedError(f"{name} is {state}, expected an nn.Linear of shape {shape}; it cannot be ranked")
        weight = checkpoint.read(f"{name}.weight")  # not the module's, whose file would stay in memory
        if not weight.any():
            raise CheckpointError(f"{name}.weight is all zeros; the model was not saved, or not trained, completely")
    if precision == "model" and device.type == "cpu":
        first = model.get_parameter(f"{next(iter(checkpoint.linear_modules))}.weight")
        if first.dtype != torch.bfloat16 or not checkpoint.shape.generates or not fast_bfloat16():
            _compute_in_float32(model, checkpoint.linear_modules)
    return model


@contextmanager
def weights_from_file(checkpoint: Checkpoint, model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let linear layers compute with weights that are mapped from the checkpoint for the length of the block.

    A loaded model's weights are mapped, too, but the pages that were read stay in memory as long as the model does.
    Weights in another dtype than the file's, or on another device than the CPU, are used as they are.
    """
    before: dict[str, Tensor] = {}
    for name in names:
        layer = model.get_submodule(name)
        if (
            not isinstance(layer, nn.Linear)
            or type(layer.weight.data) is not Tensor
            or layer.weight.device.type != "cpu"
        ):
            continue
        stored = checkpoint.read(f"{name}.weight")
        if stored.dtype == layer.weight.dtype and stored.is_contiguous():
            before[name], layer.weight.data = layer.weight.data, stored
    try:
        yield
    finally:
        for name, weight in before.items():
            model.get_parameter(f"{name}.weight").data = weight
        give_back()


def dense_weight(checkpoint: Checkpoint, model: nn.Module, name: str) -> Tensor:
    """Return a linear layer's weight on the CPU, in the model's dtype; mapped as by :func:`weights_from_file`."""
    kept = model.get_parameter(f"{name}.weight").detach()
    stored = checkpoint.read(f"{name}.weight")
    return stored if stored.dtype == kept.dtype else kept.cpu()


def _compute_in_float32(model: nn.Module, stored: Collection[str]) -> None:
    for name, module in model.named_modules():
        if name in stored:
            module.__class__ = StoredLinear
            if module.bias is not None:
                module.bias.data = module.bias.data.float()
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()


def enable_recomputation(model: nn.Module, checkpoint: Checkpoint, wanted: bool | None) -> None:
    """Let the blocks recompute their activations in training instead of keeping them (gradient checkpointing).

    Args:
        model: the loaded model.
        checkpoint: the model's files.
        wanted: whether to do it; ``None`` for models of 1e9 weights and more, if transformers can.

    Raises:
        UnsupportedError: it is wanted, but transformers cannot do it for this model.
    """
    able = bool(getattr(model, "supports_gradient_checkpointing", False))
    if wanted and not able:
        raise UnsupportedError(
            f"{checkpoint.path}: transformers cannot recompute the activations of a {type(model).__name__}; "
            "go without  --recompute-activations"
        )
    if wanted or (wanted is None and able and linear_weights(checkpoint) >= _RECOMPUTED_WEIGHTS):
        # The older name, which transformers 6 drops, warns where the newer exists.
        newer = getattr(model, "activation_checkpointing_enable", None)
        enable: Any = newer or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def embedding_names(model: nn.Module) -> tuple[str, str | None]:
    """Return the module names of the input embedding and the head over the vocabulary, if there is one."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    return names[id(embedding)], names.get(id(head))
