"""A model of transformers, traced by torch.onnx with marks in place of everything that has weights.

A linear layer, an embedding or a parameter becomes one node of the domain :data:`converters.onnx.graph.decided.MARKS`
that names its tensor. So no weight exists while tracing, no number can be folded into the graph, and the graph depends
on the configuration alone; :mod:`converters.onnx.graph.substitute` puts the plan's nodes where the marks are.

Where transformers lets attention be exchanged, it becomes one GroupQueryAttention node per layer, as in the model
builder's graphs. Elsewhere it stays what PyTorch computes: keys and values are joined, scores exist.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from acip_export.errors import MissingExtraError, UnsupportedError
from converters.onnx.graph.decided import EMBEDDING, LINEAR, MARKS, MICROSOFT, OPSET, PARAMETER

# Sizes of the traced example. None of them may be 0 or 1, which torch.export takes for constants.
_BATCH, _TOKENS, _PAST = 2, 3, 5
# Linear layers whose class computes the same as nn.Linear in its own way.
_LINEAR_CLASSES = ("Linear", "NonDynamicallyQuantizableLinear", "FalconLinear")
_ATTENTION = "acip_onnx"
# Arguments of attention functions that change nothing here: shapes, caches and dropout are known otherwise.
_HARMLESS = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "cache_position", "head_mask"}
# onnxruntime refuses GroupQueryAttention for any other width of a head.
_FUSED_WIDTHS = 8

logger = logging.getLogger(__name__)

Described = list[tuple[str, tuple[int | str, ...]]]
"""Names of inputs or outputs, each with its shape."""


class _MarkedLinear(nn.Module):
    def __init__(self, name: str, layer: nn.Linear) -> None:
        super().__init__()
        self.mark = f"{name}.weight"
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.bias = layer.bias
        # Some models ask a layer for the type of its weight.
        self.weight = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y = _mark(LINEAR, self.mark, (x,), (*x.shape[:-1], self.out_features))
        return y if self.bias is None else y + self.bias


class _MarkedEmbedding(nn.Embedding):
    mark: str

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return _mark(EMBEDDING, self.mark, (input,), (*input.shape, self.embedding_dim))


def _mark(kind: str, tensor: str, inputs: tuple[Tensor, ...], shape: tuple[Any, ...]) -> Tensor:
    made: Tensor = torch.onnx.ops.symbolic(
        f"{MARKS}::{kind}", inputs, {"tensor": tensor}, dtype=torch.float32, shape=shape, version=1
    )
    return made


def trace_decoder(model: nn.Module) -> bytes:
    """Trace a causal language model from :func:`without_weights` with its KV cache: a serialized ONNX model.

    The same configuration gives the same bytes in every process.

    Raises:
        UnsupportedError: torch.export cannot express it, or its cache is not keys and values of every layer.
        MissingExtraError: onnxscript is not installed.
    """
    _replace_weights(model)
    shapes = _cache_shapes(model)
    return _trace_decoder(model, shapes, _is_fusible(model, shapes))


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Inside, models are built with parameters that have no storage, but with real buffers."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    replaced: Any = nn.Module
    replaced.register_parameter = on_meta
    try:
        yield
    finally:
        replaced.register_parameter = register


def _replace_weights(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            if type(module).__name__ not in _LINEAR_CLASSES:
                raise UnsupportedError(
                    f"{name} is a {type(module).__name__}, which may compute more than a product; no ONNX export for it"
                )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _MarkedLinear(name, module))
        elif isinstance(module, nn.Embedding):
            kind = type(module)
            own = () if kind is nn.Embedding else (kind,)
            module.__class__ = type(f"Marked{kind.__name__}", (*own, _MarkedEmbedding), {"mark": f"{name}.weight"})
    for name, parameter in model.named_parameters():
        holder = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim != 1 and not isinstance(holder, _MarkedEmbedding):
            raise UnsupportedError(
                f"{name} of {tuple(parameter.shape)} is the weight of no linear layer and no embedding (it is in a "
                f"{type(holder).__name__}); no ONNX export for it"
            )


class _Decoder(nn.Module):
    """Plain tensors in and out. The model is no submodule: its parameters are marks that appear while it runs."""

    def __init__(self, model: nn.Module, fused: bool) -> None:
        super().__init__()
        self._run = (model, fused)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        from transformers import DynamicCache

        model, fused = self._run
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        attention = _FusedAttention(cache, attention_mask) if fused else None
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        with contextlib.nullcontext() if attention is None else attention.active():
            logits = _with_marked_parameters(model, {**inputs, "past_key_values": cache, "use_cache": True}).logits
        if attention is not None:
            return logits, attention.present()
        return logits, [tensor for pair in _cached(cache) for tensor in pair]


def _cached(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _with_marked_parameters(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    marks = {
        name: _mark(PARAMETER, name, (), tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1
    }
    return torch.func.functional_call(model, marks, (), dict(inputs), strict=False)


def _is_fusible(model: nn.Module, shapes: list[tuple[int, int, int]]) -> bool:
    """Whether all of a model's attention goes through one node per layer: it is tried on two tokens."""
    try:
        _choose_attention(model, fused=True)
        with torch.no_grad():
            _Decoder(model, fused=True)(*_example(model, shapes))
    except _NotFusedError as reason:
        logger.info("attention is not fused: %s", reason)
        return False
    except Exception as reason:  # a model that asks its attention or cache for more than we give it
        logger.info("attention is not fused: %r", reason)
        return False
    return True


def _choose_attention(model: nn.Module, fused: bool) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    attend: Any = _attend
    mask: Any = _Mask
    AttentionInterface.register(_ATTENTION, attend)
    AttentionMaskInterface.register(_ATTENTION, mask)
    config: Any = model.config
    config._attn_implementation = _ATTENTION if fused else "eager"


def _example(model: nn.Module, shapes: list[tuple[int, int, int]]) -> tuple[Any, ...]:
    tokens = torch.ones(_BATCH, _TOKENS, dtype=torch.long)
    positions = torch.arange(_PAST, _PAST + _TOKENS).expand(_BATCH, -1).contiguous()
    past = [tuple(torch.zeros(_BATCH, heads, _PAST, size) for size in sizes) for heads, *sizes in shapes]
    seen = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.long)
    return tokens, seen, positions if _accepts(model, "position_ids") else None, past


def _trace_decoder(model: nn.Module, shapes: list[tuple[int, int, int]], fused: bool) -> bytes:
    _choose_attention(model, fused)
    example = _example(model, shapes)
    size = torch.export.Dim.DYNAMIC
    both = {0: size, 1: size}
    cached = ({0: size, 2: size}, {0: size, 2: size})
    dynamic = (both, both, None if example[2] is None else both, [cached] * len(shapes))

    text = ("batch_size", "sequence_length")
    inputs: Described = [("input_ids", text), ("attention_mask", ("batch_size", "total_sequence_length"))]
    if example[2] is not None:
        inputs.append(("position_ids", text))
    config: Any = model.config
    outputs: Described = [("logits", (*text, int(config.vocab_size)))]
    for layer, (heads, *sizes) in enumerate(shapes):
        for kind, width in zip(("key", "value"), sizes, strict=True):
            inputs.append((f"past_key_values.{layer}.{kind}", ("batch_size", heads, "past_sequence_length", width)))
            outputs.append((f"present.{layer}.{kind}", ("batch_size", heads, "total_sequence_length", width)))
    return _export(_Decoder(model, fused), example, dynamic, inputs, outputs, type(model).__name__)


def _accepts(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _cache_shapes(model: nn.Module) -> list[tuple[int, int, int]]:
    """Heads, key width and value width of every layer: asked of the model itself, with tensors that have no numbers."""
    from transformers import DynamicCache

    _choose_attention(model, fused=False)
    cache = DynamicCache()
    tokens = torch.ones(1, _TOKENS, dtype=torch.long)
    try:
        with torch.no_grad():
            _with_marked_parameters(model, {"input_ids": tokens, "past_key_values": cache, "use_cache": True})
        return [(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in _cached(cache)]
    except Exception as reason:  # whatever a model does not find in its place
        raise UnsupportedError(
            f"a {type(model).__name__} cannot be traced, or its cache is not keys and values of every layer: {reason}"
        ) from reason


def _export(
    module: nn.Module,
    example: tuple[Any, ...],
    dynamic: tuple[Any, ...],
    inputs: Described,
    outputs: Described,
    name: str,
) -> bytes:
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise MissingExtraError("onnxscript", "onnx", f"the ONNX graph of a {name}") from error
    import onnx_ir as ir

    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            traced = torch.export.export(module.eval(), example, dynamic_shapes=dynamic, strict=False)
            program: Any = torch.onnx.export(traced, dynamo=True, opset_version=OPSET, verbose=False)
    except Exception as reason:  # whatever goes wrong inside the exporter means that it cannot do this model
        first = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
        raise UnsupportedError(f"torch.onnx cannot export a {name}: {first}") from reason
    finally:
        quiet.setLevel(level)
    model = program.model
    for node in model.graph:
        # Stack traces, with the paths of this machine.
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            if not output.is_graph_output():
                # Types and shapes are inferred by who reads the graph.
                output.type, output.shape = None, None
    for values, described in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, (called, shape) in zip(values, described, strict=True):
            value.metadata_props.clear()
            value.name, value.shape = called, ir.Shape(shape)
    serialized: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return serialized


class _NotFusedError(Exception):
    """The attention of a model does more than GroupQueryAttention."""


_active: list[_FusedAttention] = []


class _FusedAttention:
    """Attention as GroupQueryAttention nodes that own the cache.

    The cache hands keys and values through as they come, so that the attention function gets those of the new tokens
    only; the node joins them with the past.
    """

    def __init__(self, cache: Any, attention_mask: Tensor) -> None:
        self._past = _cached(cache)
        self._present: dict[int, tuple[Tensor, Tensor]] = {}
        self._layer: int | None = None
        self._last = (attention_mask.sum(1) - 1).to(torch.int32)
        self._total = torch.full((), attention_mask.shape[1], dtype=torch.int32)
        cache.update = self._update

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        _active.append(self)
        try:
            yield
        finally:
            _active.pop()

    def present(self) -> list[Tensor]:
        if len(self._present) != len(self._past):
            raise _NotFusedError(f"{len(self._present)} of {len(self._past)} layers go through it")
        return [tensor for layer in range(len(self._past)) for tensor in self._present[layer]]

    def _update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._layer = layer
        return keys, values

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """Arguments (batch, heads, new tokens, width); returns (batch, new tokens, query heads, width)."""
        layer, self._layer = self._layer, None
        if layer is None:
            raise _NotFusedError("a layer attends without having updated the cache")
        past_key, past_value = self._past[layer]
        batch, heads, tokens, width = query.shape
        kv_heads = past_key.shape[1]
        if key.shape[1] != kv_heads or past_value.shape[3] != past_key.shape[3] or width % _FUSED_WIDTHS:
            raise _NotFusedError("heads or widths that GroupQueryAttention does not have")
        flat = [tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value)]
        total = past_key.shape[2] + tokens
        cached = (batch, kv_heads, total, width)
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
        attributes["scale"] = float(width**-0.5 if scale is None else scale)
        if window is not None:
            attributes["local_window_size"] = window
        if softcap:
            attributes["softcap"] = float(softcap)
        found, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            f"{MICROSOFT}::GroupQueryAttention",
            (*flat, past_key, past_value, self._last, self._total),
            attributes,
            dtypes=[torch.float32] * 3,
            shapes=[(batch, tokens, heads * width), cached, cached],
            version=1,
        )
        self._present[layer] = present_key, present_value
        return found.reshape(batch, tokens, heads, width)


class _Mask:
    """What transformers passes on to the attention as its mask: the rule, which is all that the node takes."""

    def __init__(self, *_: Any, mask_function: Callable[..., Tensor], **__: Any) -> None:
        self._sees = mask_function

    def check(self, window: int | None) -> None:
        """Raises _NotFusedError unless queries see all tokens up to their own, or the last ``window`` of those."""
        reach = 2 * _PAST if window is None else window
        for last in (reach + 1, 2 * reach + 3):
            query, keys = torch.tensor(last), torch.arange(last + 3)
            expected = keys <= query
            if window is not None:
                expected &= keys > query - window
            if not torch.equal(self._sees(torch.tensor(0), torch.tensor(0), query, keys), expected):
                raise _NotFusedError("its mask is neither causal nor a sliding window")


def _attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | _Mask | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention functions."""
    more = sorted(name for name, given in others.items() if given is not None and name not in _HARMLESS)
    if more:
        raise _NotFusedError(f"it takes {', '.join(more)}")
    if not isinstance(mask, _Mask):
        raise _NotFusedError("it makes its own mask")
    if not torch.compiler.is_exporting():
        # Asked once, of the example that is not traced.
        mask.check(sliding_window)
    return _active[-1].attend(query, key, value, scaling, sliding_window, softcap), None
