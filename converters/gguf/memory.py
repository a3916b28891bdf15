"""What llama.cpp holds for an export beside its files. Pure formulas, upper bounds.

Source: its own log lines, for the versions in constraints.txt; a test compares them with the installed version's.
"""

from __future__ import annotations

from collections.abc import Sequence

from acip_export.artifacts.plan import Serving, TensorDecision, types_used
from acip_export.formats.protocol import ProcessBase, ServingMemory, TensorMemory
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.shape import ModelShape
from acip_export.units import ceil_div
from acip_export.weight_types import weight_type
from converters.gguf.types import GGML
from converters.process_memory import RuntimeBase

# llama.cpp rounds the cells of its KV cache up to this.
_CACHE_CELLS = 256
# What flash attention reads keys and values from, in any pair: bytes and numbers of a block. Without flash attention it
# would read no values in blocks; every runtime is opened with it.
CACHE_TYPES = {
    form.name: (form.block_bytes, form.block)
    for name in ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "f32")
    for form in GGML
    if form.name == name
}
# Positions, token ids, output ids and the like, per token of a prompt batch; at most 184 were seen.
_SMALL_TENSORS = 192
# With two threads. A layer takes 85 kB, measured between 2 and 64, the library up to a
# megabyte more with the types of a plan. Tokens and merges are strings in hash tables; what they take is beside
# the tokenizer's bytes in the files, which plans count as well and which no runtime keeps in memory.
RUNTIMES = {
    "llama.cpp": RuntimeBase(
        "xllamacpp 2026.10.11549, Linux x86_64",
        16_500_000,
        5_000_000,
        280,
        110,
        layer=90_000,
        layer_heap=90_000,
    )
}
RECOMMENDED = "llama.cpp"
# What each thread has of its own, measured with 1 to 8: queries that flash attention takes at a time, if a batch has so
# many, against as many keys; and what products with blocks of 256 weights take, whatever their size.
_THREAD_BYTES, _TILE, _SUPERBLOCK, _SUPERBLOCK_BYTES = 16_000, 64, 256, 420_000


class LlamaMemory:
    """The memory model of llama.cpp; see :class:`acip_export.formats.protocol.MemoryModel`."""

    def serving(self, shape: ModelShape, serving: Serving) -> ServingMemory:
        """Return cache and buffers for one sequence of ``serving.context`` tokens."""
        if not shape.generates:
            return _encoder(shape, serving)
        types = serving.cache_type_k, serving.cache_type_v
        per_cell = sum(_cell_bytes(shape, name) for name in types)
        batch = min(serving.prompt_batch, serving.context)
        cells = _rounded(serving.context)
        # The widest moment of the graph, in float32: the gated FFN or the attention (queries, their rotated copy and
        # output, keys and values), beside six streams of the hidden size. Then the mask. Holds for 168 random shapes,
        # LoRA adapters included. Logits are computed for the last token only: llama.cpp reserves address space for
        # those of the whole batch, but serving never touches it.
        attention = (3 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
        windowed = _window_cells(shape, batch, cells)
        full_layers = shape.layers - (sum(shape.sliding_layers) if windowed else 0)
        widest = max(3 * shape.ffn, attention) + 6 * shape.hidden
        per_prompt_token = 4 * widest + 2 * (cells + windowed) + _SMALL_TENSORS
        compute = batch * per_prompt_token + sum(_cache_buffers(shape, name, cells, windowed) for name in types)
        compute += 4 * (shape.vocabulary + shape.hidden)
        all_cells = full_layers * cells + (shape.layers - full_layers) * windowed
        return ServingMemory(per_cell * all_cells, compute, 4 * shape.vocabulary)

    def beside(self, decision: TensorDecision, embedding: bool, tied_head: bool) -> TensorMemory:  # noqa: ARG002
        """Return nothing: llama.cpp maps the stored numbers and, with repacking off, keeps nothing else."""
        return TensorMemory()

    def anonymous(self, decision: TensorDecision, embedding: bool, tied_head: bool) -> TensorMemory:  # noqa: ARG002
        """Return the pairs of an adapter, whose file is read into memory; all else is used where its file is mapped."""
        if decision.representation not in ("lora", "residual"):
            return TensorMemory()
        assert decision.rank and decision.up_type and decision.down_type
        rows, columns = decision.shape
        up, down = (weight_type("gguf", name) for name in (decision.up_type, decision.down_type))
        return TensorMemory(kept=up.nbytes(rows, decision.rank) + down.nbytes(decision.rank, columns))

    def thread(self, shape: ModelShape, serving: Serving, tensors: Sequence[TensorDecision]) -> int:
        """Return what each further thread takes: flash attention's tile, and what K-quants and their like need."""
        attention = 4 * (4 * _TILE * shape.head_dim + 2 * _TILE**2) if serving.prompt_batch >= _TILE else 0
        superblocks = any(weight_type("gguf", name).block == _SUPERBLOCK for name in types_used(tensors))
        return _THREAD_BYTES + attention + superblocks * _SUPERBLOCK_BYTES

    def process(self, checkpoint: Checkpoint, runtime: str | None = None) -> ProcessBase:
        """Return what the runtime holds whatever the plan."""
        return RUNTIMES[runtime or RECOMMENDED].of(checkpoint)


def _encoder(shape: ModelShape, serving: Serving) -> ServingMemory:
    """Count no cache; ``prompt_batch`` tokens, of texts of at most ``context``, are computed together."""
    tokens = serving.prompt_batch
    # Attention, or the FFN's wide vector, beside five streams of the hidden size; the mask. Flash attention keeps no
    # scores.
    per_token = 4 * (max(shape.ffn, shape.hidden) + 5 * shape.hidden) + 2 * _rounded(tokens) + _SMALL_TENSORS
    # Encoding makes every token an output, and room for its logits, though no head computes any: 31 MB for 256 tokens
    # of BERT's vocabulary. The log tells of one token only, from when the context is made.
    return ServingMemory(0, tokens * per_token, 4 * tokens * (shape.hidden + shape.vocabulary))


def _window_cells(shape: ModelShape, batch: int, cells: int) -> int:
    """Return the KV cache cells of a layer with a sliding window; 0 where llama.cpp has no such layer."""
    if shape.sliding_window is None:
        return 0
    from converters.gguf.architectures import applies_window

    if not applies_window(shape.architecture):
        return 0
    return _rounded(min(cells, shape.sliding_window + batch))


def _rounded(cells: int) -> int:
    return ceil_div(cells, _CACHE_CELLS) * _CACHE_CELLS


def cache_block(cache_type: str) -> int:
    """Return the numbers of a block of a KV cache, which the head size has to be a multiple of."""
    return CACHE_TYPES[cache_type][1]


def _cell_bytes(shape: ModelShape, cache_type: str) -> int:
    """Return the bytes of the keys, or of the values, of one token in one layer."""
    numerator, denominator = CACHE_TYPES[cache_type]
    return shape.kv_heads * shape.head_dim * numerator // denominator


def _cache_buffers(shape: ModelShape, cache_type: str, cells: int, windowed: int) -> int:
    """Return what keys or values of a cache type need in the compute buffer, whatever the batch."""
    if cache_type == "f32":
        return 2 * cells * shape.kv_heads * shape.head_dim  # those of one layer, cast to float16
    if cache_block(cache_type) > 1:
        caches = 2 if windowed else 1
        return caches * 4 * shape.head_dim**2  # the rotation that makes them easy to quantize
    return 0
