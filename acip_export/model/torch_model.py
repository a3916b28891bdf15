"""The torch modules that a bundle needs beyond plain transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.io.frozen import thawed
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import Pooling, is_encoder, kind_of
from acip_export.model.rope import rope_fields
from acip_export.model.tensor_names import HEAD, MASKED_HEAD


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


def causal_lm(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """An untrained model of ``config`` in evaluation mode, for ``load_state_dict``."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(transformers_config(config), dtype=dtype)  # type: ignore[no-untyped-call]
    return _with_linear_layers(model).eval()


def transformers_config(config: Mapping[str, Any]) -> Any:
    """The parsed configuration, made from a copy: transformers writes into nested values.

    Raises:
        UnsupportedError: transformers does not know the model type. CheckpointError: it refuses the fields.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    fields = thawed(config)
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(f"config.json: transformers {transformers.__version__} knows no model_type {kind!r}")
    try:
        return CONFIG_MAPPING[kind](**fields)
    except Exception as reason:  # each configuration checks in its own way
        raise CheckpointError(f"config.json: transformers refuses it: {reason}") from reason


def expected_parameters(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Shapes of what transformers' causal language model of ``config`` reads, and names that may be stored besides.

    Raises:
        UnsupportedError, CheckpointError: transformers cannot build one.
    """
    try:
        with torch.device("meta"):
            model = causal_lm(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as reason:
        raise UnsupportedError(f"transformers cannot build a model of this config.json: {reason}") from reason
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return shapes, frozenset(name for name, _ in model.named_buffers())


def _with_linear_layers(model: nn.Module) -> nn.Module:
    """GPT-2's Conv1D is a linear layer whose weight is stored as (in, out); here it is one like all others."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            with torch.device("meta"):
                layer = nn.Linear(inputs, outputs)
            layer.weight = nn.Parameter(module.weight.detach().T.contiguous(), module.weight.requires_grad)
            layer.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    return model


def untrained_model(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """An untrained model of ``config``, causal language model or encoder, for ``load_state_dict``."""
    if not is_encoder(config):
        return causal_lm(config, dtype)
    options = {"add_pooling_layer": False} if kind_of(config) == "embedding" else {}
    model: nn.Module = _encoder_class(config)._from_config(transformers_config(config), dtype=dtype, **options)
    return model.eval()


@contextmanager
def without_weights() -> Iterator[None]:
    """Give the parameters of models that are made in here no memory: they are on the device ``meta``. Buffers are real.

    Under ``torch.device("meta")`` buffers would be empty too, and nothing says how to compute them again.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _encoder_class(config: Mapping[str, Any]) -> Any:
    import transformers

    return getattr(transformers, config["architectures"][0])


def load_dense(checkpoint: Checkpoint, dtype: torch.dtype | Literal["auto"]) -> nn.Module:
    """The dense model with its weights, frozen, in evaluation mode; ``auto``: in the stored dtype.

    Raises:
        UnsupportedError: neither an encoder nor a causal language model that transformers knows.
    """
    return (load_encoder if is_encoder(checkpoint.config) else load_causal_lm)(checkpoint, dtype)


def load_encoder(checkpoint: Checkpoint, dtype: torch.dtype | Literal["auto"]) -> nn.Module:
    """An encoder without its unused pooler, and without dropout: what it is trained to match is itself.

    Raises:
        CheckpointError: tensors are missing.
    """
    model = untrained_model(
        {**checkpoint.config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, torch.float32
    )
    # Not from_pretrained, which reports every tensor that was left out on purpose on standard output.
    found = model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.tensors}, strict=False)
    missing = set(found.missing_keys) - tied_names(checkpoint)
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"{checkpoint.path} does not fit its config.json: missing {sorted(missing)[:3]}, "
            f"unexpected {sorted(found.unexpected_keys)[:3]}"
        )
    if dtype == "auto":
        dtype = next(checkpoint.read(name).dtype for name in checkpoint.tensors)
    return model.to(dtype).requires_grad_(False).eval()


def pooled(hidden: Tensor, real: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text, (n, width), from token vectors (n, length, width); ``real`` (n, length): no padding."""
    mask = real[..., None].to(hidden.dtype)
    if pooling.mode == "cls":
        vector = hidden[:, 0]
    elif pooling.mode == "max":
        vector = hidden.masked_fill(mask == 0, -torch.inf).amax(1)
    else:
        vector = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
    return nn.functional.normalize(vector, dim=-1) if pooling.normalize else vector


def tied_names(checkpoint: Checkpoint) -> set[str]:
    """Parameters that a checkpoint may leave out because another one holds their numbers."""
    heads = (HEAD,) if checkpoint.shape.generates else (MASKED_HEAD,)
    return {*(heads if checkpoint.shape.tied_embeddings else ()), "cls.predictions.decoder.bias"}


def with_fixed_positions(config: Mapping[str, Any], context: int) -> Mapping[str, Any]:
    """The configuration as runtimes read it: longrope's factors are chosen once, by the context that is served.

    ``transformers`` chooses them by the length of each text, so a short text in a long context would differ.
    """
    rope = rope_fields(config)
    if "long_factor" not in rope or context <= int(rope["original_max_position_embeddings"]):
        return config
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return {**config, key: {**config[key], "short_factor": rope["long_factor"]}}


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
    return _with_linear_layers(model).requires_grad_(False).eval()
