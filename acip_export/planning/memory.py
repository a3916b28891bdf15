"""What a runtime holds beside the weights, in bytes. Pure formulas, upper bounds.

Source of llama.cpp's: its own log lines, for the versions in constraints.txt; a test compares them with the installed
version's. onnxruntime's are in :mod:`acip_export.planning.memory_onnx`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from acip_export.artifacts.plan import Plan, Serving, TensorDecision
from acip_export.formats.targets import applies_window
from acip_export.formats.targets import target as find_target
from acip_export.model.checkpoint import Checkpoint, ModelShape
from acip_export.model.tensor_names import is_embedding
from acip_export.planning import memory_onnx
from acip_export.planning.runtime_base import process_base
from acip_export.weight_types import weight_type

# llama.cpp rounds the cells of its KV cache up to this.
_LLAMA_CACHE_CELLS = 256
# Positions, token ids, output ids and the like, per token of a prompt batch; at most 184 were seen.
_LLAMA_SMALL_TENSORS = 192
PROMPT_BATCHES = (512, 256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class RuntimeMemory:
    """Bytes beside the weights."""

    kv_cache: int
    compute: int
    output: int

    @property
    def total(self) -> int:
        return self.kv_cache + self.compute + self.output


def runtime_memory(target: str, shape: ModelShape, serving: Serving) -> RuntimeMemory:
    """KV cache, compute and output buffers for one sequence of ``serving.context`` tokens."""
    numerator, denominator = find_target(target, serving.backend).cache_types[serving.cache_type]
    per_cell = 2 * shape.kv_heads * shape.head_dim * numerator
    if not shape.generates:
        return _encoder_memory(target, shape, serving)
    batch = min(serving.prompt_batch, serving.context)
    if target == "gguf":
        cells = -(-serving.context // _LLAMA_CACHE_CELLS) * _LLAMA_CACHE_CELLS
        # The widest moment of the graph, in float32: the gated FFN or the attention (queries, their rotated copy and
        # output, keys and values), beside six streams of the hidden size. Then the mask. Holds for 168 random shapes,
        # LoRA adapters included. Logits are computed for the last token only: llama.cpp reserves address space for
        # those of the whole batch, but serving never touches it.
        attention = (3 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
        windowed = _llama_window_cells(shape, batch, cells)
        full_layers = shape.layers - (sum(shape.sliding_layers) if windowed else 0)
        widest = max(3 * shape.ffn, attention) + 6 * shape.hidden
        per_prompt_token = 4 * widest + 2 * (cells + windowed) + _LLAMA_SMALL_TENSORS
        compute = batch * per_prompt_token + _llama_cache_buffers(shape, serving.cache_type, cells, windowed)
        compute += 4 * (shape.vocabulary + shape.hidden)
        all_cells = full_layers * cells + (shape.layers - full_layers) * windowed
        return RuntimeMemory(per_cell * all_cells // denominator, compute, 4 * shape.vocabulary)
    kv_cache = per_cell * shape.layers * serving.context // denominator
    compute = memory_onnx.activation_bytes(shape, serving)
    if not shape.fused_attention:
        # A longer cache is made while the old one is there.
        compute += memory_onnx.plain_attention_bytes(shape, serving) + kv_cache
    return RuntimeMemory(kv_cache, compute, memory_onnx.logit_bytes(shape, serving))


def _encoder_memory(target: str, shape: ModelShape, serving: Serving) -> RuntimeMemory:
    """No cache; ``serving.prompt_batch`` tokens, of texts of at most ``serving.context``, are computed together."""
    tokens = serving.prompt_batch
    if target == "onnx":
        return RuntimeMemory(0, memory_onnx.encoder_bytes(shape, serving), 4 * tokens * shape.hidden)
    # Attention, or the FFN's wide vector, beside five streams of the hidden size; the mask. Flash attention keeps no
    # scores.
    cells = -(-tokens // _LLAMA_CACHE_CELLS) * _LLAMA_CACHE_CELLS
    per_token = 4 * (max(shape.ffn, shape.hidden) + 5 * shape.hidden) + 2 * cells + _LLAMA_SMALL_TENSORS
    # Encoding makes every token an output, and room for its logits, though no head computes any: 31 MB for 256 tokens
    # of BERT's vocabulary. The log tells of one token only, from when the context is made.
    return RuntimeMemory(0, tokens * per_token, 4 * tokens * (shape.hidden + shape.vocabulary))


def repacked_bytes(decision: TensorDecision, target: str, embedding: bool, tied_head: bool) -> tuple[int, int, int]:
    """What the runtime keeps of a tensor beside its stored numbers.

    llama.cpp maps them and, with repacking off, keeps nothing else.

    Args:
        embedding: the tensor is one. tied_head: and the head reads it too.

    Returns:
        Bytes for as long as the model is loaded; bytes that are held once, for the tensor that needs most of them; and
        bytes that are held once while loading.
    """
    if target != "onnx" or len(decision.shape) != 2:
        return 0, 0, 0
    rows, columns = decision.shape
    parts = (
        [(rows, columns, decision.type)]
        if decision.rank is None
        else [
            (decision.rank, columns, decision.down_type),
            (rows, decision.rank, decision.up_type),
        ]
    )
    products = [(m, n, weight_type(target, name or "")) for m, n, name in parts]
    kept = sum(memory_onnx.packed_bytes(*product) for product in products)
    if tied_head:
        kept += memory_onnx.tied_bytes(*products[0])
    packed = tied_head or not embedding
    loading = max(memory_onnx.loading_bytes(*product) for product in products) if packed else 0
    return kept, max(memory_onnx.leftover_bytes(*product) for product in products), loading


@dataclass(frozen=True)
class HeldBytes:
    """What the runtime holds of a model's weights beside the files.

    Attributes:
        kept: as long as the model is loaded.
        loading: what loading takes beyond what running takes: a matrix is there twice while it is repacked, before
            caches, buffers and tokenizer are; then the tokenizer is built, before caches and buffers are.
    """

    kept: int
    loading: int

    @property
    def total(self) -> int:
        return self.kept + self.loading


def held_bytes(
    target: str, checkpoint: Checkpoint, tensors: Sequence[TensorDecision], serving: Serving, process: str | None = None
) -> HeldBytes:
    """:func:`repacked_bytes` of a whole model, in the recommended runtime or in ``process``."""
    tied = checkpoint.shape.tied_embeddings
    looked_up = [is_embedding(decision.name) for decision in tensors]
    parts = [repacked_bytes(d, target, lookup, tied and lookup) for d, lookup in zip(tensors, looked_up, strict=True)]
    kept, once, loading = zip(*parts, strict=True)
    base = process_base(target, checkpoint, process)
    running = runtime_memory(target, checkpoint.shape, serving).total + base.tokenizer
    return HeldBytes(sum(kept) + max(once), max(0, max(*loading, base.building) - running))


def uncounted_bytes(plan: Plan, checkpoint: Checkpoint, process: str) -> int:
    """What a process of the runtime ``process`` holds beside the ``memory_bytes`` of ``plan``.

    Its library and tokenizer. One that has a smaller tokenizer than the runtime that was planned for has less to build
    in what loading freed, so that more of that stays on top.
    """
    planned = held_bytes(plan.format, checkpoint, plan.tensors, plan.serving).loading
    loading = held_bytes(plan.format, checkpoint, plan.tensors, plan.serving, process).loading
    return process_base(plan.format, checkpoint, process).total + loading - planned


def memory_breakdown(
    target: str, checkpoint: Checkpoint, tensors: Sequence[TensorDecision], file_bytes: int, serving: Serving
) -> dict[str, int]:
    """Everything that a process serving the export holds, in bytes by purpose; docs/memory.md says how."""
    memory, base = runtime_memory(target, checkpoint.shape, serving), process_base(target, checkpoint)
    held = held_bytes(target, checkpoint, tensors, serving)
    stored = sum(decision.nbytes for decision in tensors)
    return {
        "weights": stored,
        "repacked_weights": held.kept,
        "loading": held.loading,
        "tokenizer_and_metadata": file_bytes - stored,
        "kv_cache": memory.kv_cache,
        "compute": memory.compute,
        "output": memory.output,
        "runtime_library": base.library,
        "runtime_tokenizer": base.tokenizer,
    }


def _llama_window_cells(shape: ModelShape, batch: int, cells: int) -> int:
    """KV cache cells of a layer with a sliding window; 0 where llama.cpp has no such layer."""
    if shape.sliding_window is None or not applies_window("gguf", shape):
        return 0
    needed = min(cells, shape.sliding_window + batch)
    return -(-needed // _LLAMA_CACHE_CELLS) * _LLAMA_CACHE_CELLS


def _llama_cache_buffers(shape: ModelShape, cache_type: str, cells: int, windowed: int) -> int:
    """What a cache type needs in the compute buffer, whatever the batch."""
    if cache_type == "f32":
        return 2 * 2 * cells * shape.kv_heads * shape.head_dim  # one layer's K and V, cast to float16
    if cache_type == "q8_0":
        caches = 2 if windowed else 1
        return caches * 2 * 4 * shape.head_dim**2  # the rotations that make K and V easy to quantize
    return 0


def choose_prompt_batch(target: str, shape: ModelShape, serving: Serving, room: int) -> int:
    """The largest prompt batch whose buffers take at most an eighth of ``room`` bytes.

    Large batches make prompts fast; beyond an eighth of the memory they cost more quality than they save time.
    """
    context = serving.context
    if not shape.generates:
        return context  # a text is computed in one piece
    for batch in PROMPT_BATCHES:
        memory = runtime_memory(target, shape, replace(serving, prompt_batch=min(batch, context)))
        if memory.compute + memory.output <= room // 8:
            return min(batch, context)
    return min(PROMPT_BATCHES[-1], context)
