"""The decoder families that have an ONNX graph: one table entry each, and what the stock builder lacks for them.

A family's mixin goes in front of the builder's own class. It overrides methods of the builder only; that these exist
with the expected parameters is checked in :mod:`converters.onnx.genai_builder.builder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How a ``model_type`` of transformers becomes a graph.

    Attributes:
        builder: class of the builder's package. mixin: overrides in front of it.
        genai_type: the name under which onnxruntime-genai runs it as a plain decoder.
        norm_adds_one: norms multiply with ``1 + weight`` and the embedding is scaled by ``sqrt(hidden)`` (Gemma).
    """

    builder: str
    genai_type: str
    mixin: type | None = None
    norm_adds_one: bool = False


class _Builder:
    """What the mixins use of the builder's classes."""

    make_matmul: Callable[..., str]
    make_split: Callable[..., None]
    make_add: Callable[..., None]
    make_mul: Callable[..., None]
    make_node: Callable[..., None]
    make_value: Callable[..., Any]
    make_initializer: Callable[..., None]
    make_activation: Callable[..., str]
    make_layernorm: Callable[..., None]
    make_mlp: Callable[..., None]
    make_hidden_state_shape: Callable[..., list[Any]]
    layernorm_attrs: dict[str, Any]
    attention_attrs: dict[str, Any]
    mlp_attrs: dict[str, Any]
    io_dtype: Any
    q_size: int
    kv_size: int
    intermediate_size: int
    num_layers: int


class _QueryKeyNorms(_Builder):
    """Heads of queries and keys are normalised; the builder has the nodes, and this class of it does not ask for them.

    Its own Gemma 3 reads configurations of transformers 4.
    """

    def make_attention_init(self, config: Any) -> None:
        self.attention_attrs["q_norm"] = self.attention_attrs["k_norm"] = True
        super().make_attention_init(config)  # type: ignore[misc]


class _UncappedAttention(_QueryKeyNorms):
    """Gemma 3: transformers reads a cap of the attention from its configuration and leaves it alone."""

    def make_attention_init(self, config: Any) -> None:
        self.attention_attrs["softcap"] = 0.0
        super().make_attention_init(config)


class _LayersWithoutPositions(_Builder):
    """SmolLM3: every fourth layer has no rotary embedding."""

    no_rope_layers: list[int]

    def __init__(self, config: Any, *args: Any) -> None:
        super().__init__(config, *args)  # type: ignore[call-arg]
        self.no_rope_layers = config.no_rope_layers

    def make_attention(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
        # Despite the config's name, a 1 means that the layer has one.
        self.attention_attrs["rope"] = bool(self.no_rope_layers[layer_id])
        super().make_attention(layer_id, attention, root_input, **kwargs)  # type: ignore[misc]
        self.attention_attrs["rope"] = True


class _FusedProjections(_Builder):
    """Phi-3: one matrix for q, k and v, and one for gate and up. They stay one product each, and are split after it.

    The stock builder cuts the weights instead, which a factor pair cannot be.
    """

    def make_attention_input_proj(self, layer_id: int, attention: Any, root_input: str, **_kwargs: Any) -> None:
        parts = self._split_product(
            attention.qkv_proj,
            f"/model/layers.{layer_id}/attn/qkv_proj",
            root_input,
            (self.q_size, self.kv_size, self.kv_size),
        )
        self.attention_attrs["q_path"], self.attention_attrs["k_path"], self.attention_attrs["v_path"] = parts

    def make_mlp_unpacked(self, layer_id: int, mlp: Any, root_input: str) -> None:
        """Nothing to unpack."""

    def make_mlp_proj(self, layer_id: int, mlp: Any, root_input: str) -> None:
        stem, width = f"/model/layers.{layer_id}/mlp", self.intermediate_size
        gate, up = self._split_product(mlp.gate_up_proj, f"{stem}/gate_up_proj", root_input, (width, width))
        activated = self.make_activation(layer_id, root_input=gate)
        self.make_mul(
            f"{stem}/Mul",
            [f"{activated}/output_0", up],
            dtype=self.io_dtype,
            shape=self.make_hidden_state_shape(last_dim=width),
        )
        down = self.make_matmul(mlp.down_proj, f"{stem}/down_proj/MatMul", f"{stem}/Mul/output_0")
        self.mlp_attrs["output_0"] = f"{down}/output_0"

    def _split_product(self, projection: Any, stem: str, root_input: str, widths: tuple[int, ...]) -> list[str]:
        product = self.make_matmul(projection, f"{stem}/MatMul", root_input)
        outputs = [f"{stem}/Split/output_{index}" for index in range(len(widths))]
        self.make_split(
            f"{stem}/Split",
            [f"{product}/output_0", f"/model/constants/INT64/{list(widths)}"],
            outputs,
            dtypes=[self.io_dtype] * len(widths),
            shapes=[self.make_hidden_state_shape(last_dim=width) for width in widths],
        )
        return outputs


class _NormsAfter(_QueryKeyNorms):
    """OLMo 2: norms after attention and MLP, none before; queries and keys are normalised over all heads at once."""

    def make_layer(self, layer_id: int, layer: Any) -> None:
        attrs = self.layernorm_attrs
        residual = attrs["root_input"]
        self.make_attention(layer_id, layer.self_attn, root_input=residual)  # type: ignore[attr-defined]
        update = self._norm(layer_id, layer.post_attention_layernorm, "post_attention")
        residual = self._sum(f"/model/layers.{layer_id}/attn/residual", residual, update)
        self.make_mlp(layer_id, layer.mlp, root_input=residual)
        update = self._norm(layer_id, layer.post_feedforward_layernorm, "post_feedforward")
        attrs["first_layernorm"] = False
        if layer_id == self.num_layers - 1:
            # The final norm adds its two inputs.
            attrs["root_input"], attrs["skip_input"], attrs["last_layernorm"] = residual, update, True
        else:
            attrs["root_input"] = self._sum(f"/model/layers.{layer_id}/mlp/residual", residual, update)

    def _norm(self, layer_id: int, norm: Any, location: str) -> str:
        """Of the last block's output, which the builder leaves as the next skip input."""
        self.layernorm_attrs["root_input"] = self.layernorm_attrs["skip_input"]
        self.make_layernorm(layer_id, norm, skip=False, simple=True, location=location)
        return str(self.layernorm_attrs["output_0"])

    def _sum(self, stem: str, left: str, right: str) -> str:
        self.make_add(f"{stem}/Add", [left, right], dtype=self.io_dtype, shape=self.make_hidden_state_shape())
        return f"{stem}/Add/output_0"

    def make_qk_norm(self, layer_id: int, attention: Any) -> None:
        for role, norm, width in (("q", attention.q_norm, self.q_size), ("k", attention.k_norm, self.kv_size)):
            name = f"/model/layers.{layer_id}/attn/{role}_norm/SimplifiedLayerNormalization"
            weight = f"model.layers.{layer_id}.attn.{role}_norm.layernorm.weight"
            self.make_initializer(norm.weight, weight, to=self.io_dtype)
            self.make_node(
                "SimplifiedLayerNormalization",
                inputs=[self.attention_attrs[f"{role}_path"], weight],
                outputs=[f"{name}/output_0"],
                name=name,
                epsilon=self.layernorm_attrs["epsilon"],
                axis=-1,
                stash_type=1,
            )
            self.make_value(f"{name}/output_0", self.io_dtype, shape=self.make_hidden_state_shape(last_dim=width))
            self.attention_attrs[f"{role}_path"] = f"{name}/output_0"


FAMILIES: dict[str, Family] = {
    "ernie4_5": Family("ErnieModel", "ernie4_5"),
    "gemma2": Family("Gemma2Model", "gemma2", norm_adds_one=True),
    "gemma3_text": Family("Gemma2Model", "gemma3_text", _UncappedAttention, norm_adds_one=True),
    "granite": Family("GraniteModel", "granite"),
    "llama": Family("LlamaModel", "llama"),
    "mistral": Family("MistralModel", "mistral"),
    "olmo2": Family("LlamaModel", "olmo", _NormsAfter),
    "phi3": Family("Phi3MiniModel", "phi3", _FusedProjections),
    "qwen2": Family("QwenModel", "qwen2"),
    "qwen3": Family("Qwen3Model", "qwen3"),
    "smollm3": Family("LlamaModel", "smollm3", _LayersWithoutPositions),
}


def genai_type(config: Mapping[str, Any]) -> str:
    """The name of a model for onnxruntime-genai; of those that are traced, its name for any decoder."""
    family = FAMILIES.get(str(config.get("model_type")))
    return "decoder" if family is None else family.genai_type
