"""What onnxruntime's CPU provider holds for an export beside its files. Pure formulas, upper bounds.

Measured with onnxruntime 1.31 and onnxruntime-genai 0.18 (anonymous and file-backed resident memory of a process, over
formats, block sizes, tied and untied heads, contexts and prompt batches); a test measures again:

- Weights are mapped from the data file. Every MatMul packs its float weight into a copy and lets go of the original;
  the tied head cannot, because the embedding still reads it.
- MatMulNBits (accuracy level 4) packs codes, scales and block sums, and keeps the original scales: 8 bytes a block more
  than the file has, and 11 kB a node. The largest one's scales are held once more.
- The tied, quantized embedding reads a reshaped copy of the head's codes.
- Attention works in place on the shared KV cache, rounded or not, and keeps no matrix of probabilities. Where a traced
  graph has no node for it, :func:`plain_attention_bytes` is added.
- The widest moment of a prompt batch is the gated FFN: gate, its sigmoid, their product and up. The logits of the whole
  batch are an output of the graph. The last batch of a prompt is shorter: its logits are made while those before are
  held. Whether the memory of those goes back to the system then is glibc's to decide, see :func:`shorter_batch`.
- Anonymous, so that the system cannot drop it, are the packed copies, the reshaped codes, caches, buffers and the heap.
  Original scales, and an embedding that is only looked up or is in floats, are read where the file is mapped.
- While a matrix is packed, the file's pages of it are resident too. Packed in any order, so the largest one decides;
  it is over before caches, activations and logits exist, and what it took is used for them.

Measured on the processor. Graphs in float16, for graphics cards, are taken to hold the same things at half the size.
"""

from __future__ import annotations

from collections.abc import Sequence

from acip_export.artifacts.plan import Serving, TensorDecision
from acip_export.formats.protocol import Hole, ProcessBase, ServingMemory, TensorMemory
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.shape import ModelShape
from acip_export.units import ceil_div
from acip_export.weight_types import WeightType, weight_type
from converters.onnx.backends import ROUNDED_CACHES, computed_in
from converters.process_memory import RuntimeBase

_CACHE_BITS = {"f32": 32, "f16": 16, **ROUNDED_CACHES}
_PACKED_BLOCK_BYTES = 8
# Measured up to contexts of 8,192 tokens.
_TOKEN_BYTES = 100
# What a thread has of its own, measured up to 32 threads; and the cache of a core that attention's blocks are cut to.
_THREAD_BYTES, _CORE_CACHE = 65_000, 2**20
# Of glibc: blocks up to the largest that was given back so far come from the heap, but none that is larger than this.
_LARGEST_ON_HEAP = 32 * 2**20
# Measured between 2 and 32 layers, together with what a layer takes.
_QUANTIZED_NODE_BYTES = 11_000
RUNTIMES = {
    "onnxruntime-genai": RuntimeBase(
        "0.18.0 with onnxruntime 1.31.1, Linux x86_64",
        36_400_000,
        9_300_000,
        135,
        135,
        building=0.6,
        layer=150_000,
        layer_heap=150_000,
        holes=True,
    ),
    "onnxruntime": RuntimeBase(
        "onnxruntime 1.31.1, Linux x86_64", 31_200_000, 9_300_000, 0, 0, layer=150_000, layer_heap=150_000
    ),
}
# What plans are made for: models that generate, and encoders.
_GENERATOR, _ENCODER = "onnxruntime-genai", "onnxruntime"


class OnnxMemory:
    """The memory model of onnxruntime; see :class:`acip_export.formats.protocol.MemoryModel`."""

    def serving(self, shape: ModelShape, serving: Serving) -> ServingMemory:
        """Return cache and buffers for one sequence of ``serving.context`` tokens."""
        if not shape.generates:
            return ServingMemory(0, encoder_bytes(shape, serving), 4 * serving.prompt_batch * shape.hidden)
        numbers = 2 * shape.kv_heads * shape.head_dim * shape.layers * serving.context
        kv_cache = numbers * _CACHE_BITS[serving.cache_type_k] // 8
        compute = activation_bytes(shape, serving) + context_bytes(serving)
        if not shape.fused_attention:
            # A longer cache is made while the old one is there.
            compute += plain_attention_bytes(shape, serving) + kv_cache
        return ServingMemory(kv_cache, compute, logit_bytes(shape, serving), shorter_batch(shape, serving))

    def beside(self, decision: TensorDecision, embedding: bool, tied_head: bool) -> TensorMemory:
        """Return what onnxruntime packs of a tensor, and what packing takes."""
        products = _products(decision)
        if not products:
            return TensorMemory()
        kept = sum(packed_bytes(*product) for product in products)
        if tied_head:
            kept += tied_bytes(*products[0])
        packed = tied_head or not embedding
        loading = max(loading_bytes(*product) for product in products) if packed else 0
        blocks = _heap_block(products) if packed else 0
        return TensorMemory(kept, max(leftover_bytes(*product) for product in products), loading, blocks)

    def anonymous(self, decision: TensorDecision, embedding: bool, tied_head: bool) -> TensorMemory:
        """Return what onnxruntime packs or copies of a tensor; what it reads where the file is mapped is free."""
        products = _products(decision)
        if not products:
            return TensorMemory(kept=decision.nbytes)
        if embedding and not tied_head:
            return TensorMemory()
        kept = sum(copied_bytes(*product) for product in products)
        if tied_head and not products[0][2].is_float:
            kept += tied_bytes(*products[0])
        once = max(leftover_bytes(*product) for product in products)
        return TensorMemory(kept, once, heap_block=_heap_block(products))

    def thread(self, shape: ModelShape, serving: Serving, tensors: Sequence[TensorDecision]) -> int:  # noqa: ARG002
        """Return what each further thread takes, whatever the types."""
        return _THREAD_BYTES + (2 * attention_scratch_bytes(shape, serving) if shape.fused_attention else 0)

    def process(self, checkpoint: Checkpoint, runtime: str | None = None) -> ProcessBase:
        """Return what the runtime holds whatever the plan."""
        return RUNTIMES[runtime or (_GENERATOR if checkpoint.shape.generates else _ENCODER)].of(checkpoint)


def _products(decision: TensorDecision) -> list[tuple[int, int, WeightType]]:
    """Return rows, columns and type of the matrices that a tensor becomes; of one with one dimension none."""
    if len(decision.shape) != 2:
        return []
    rows, columns = decision.shape
    parts = (
        [(rows, columns, decision.type)]
        if decision.rank is None
        else [(decision.rank, columns, decision.down_type), (rows, decision.rank, decision.up_type)]
    )
    return [(m, n, weight_type("onnx", name or "")) for m, n, name in parts]


def copied_bytes(rows: int, columns: int, form: WeightType) -> int:
    """Bytes of the copy that a matrix product packs: all but the original scales, which stay mapped."""
    return form.nbytes(rows, columns) - leftover_bytes(rows, columns, form) + packed_bytes(rows, columns, form)


def packed_bytes(rows: int, columns: int, form: WeightType) -> int:
    """Bytes beside the stored ones that a matrix product keeps."""
    return 0 if form.is_float else _blocks(rows, columns, form) * _PACKED_BLOCK_BYTES + _QUANTIZED_NODE_BYTES


def leftover_bytes(rows: int, columns: int, form: WeightType) -> int:
    """Held once, for the largest matrix: its scales again."""
    return 0 if form.is_float else _blocks(rows, columns, form) * form.item_bytes


def loading_bytes(rows: int, columns: int, form: WeightType) -> int:
    """Held once, while the largest matrix is packed: its codes or floats as the file has them."""
    return form.nbytes(rows, columns) - (0 if form.is_float else _blocks(rows, columns, form) * form.item_bytes)


def given_back_bytes(rows: int, columns: int, form: WeightType) -> int:
    """Bytes of the block that packing a matrix gives back to the heap: its codes; floats are mapped."""
    return 0 if form.is_float else _blocks(rows, columns, form) * (form.block_bytes - form.item_bytes)


def tied_bytes(rows: int, columns: int, form: WeightType) -> int:
    """What a head that is tied to an embedding of ``form`` costs beside :func:`packed_bytes`."""
    stored = form.nbytes(rows, columns)
    return stored if form.is_float else stored - _blocks(rows, columns, form) * form.item_bytes


def activation_bytes(shape: ModelShape, serving: Serving) -> int:
    """Float32 activations of one prompt batch, without the logits."""
    batch = min(serving.prompt_batch, serving.context)
    return _item_bytes(serving) * batch * (4 * shape.ffn + 6 * shape.hidden + 2 * shape.heads * shape.head_dim)


def attention_scratch_bytes(shape: ModelShape, serving: Serving) -> int:
    """Float32 scores of a block of queries and keys, and its output: each thread has them, while attention lasts.

    Where all of the threads' together lie on the heap, they are a hole there for what comes next, so that processes
    were measured to take up to twice as much.
    """
    head = shape.head_dim
    keys = min(serving.context, max(1, _CORE_CACHE // (32 * head)))
    queries = min(serving.prompt_batch, keys, 2 * head)
    return 4 * queries * (keys + head + 2)


def context_bytes(serving: Serving) -> int:
    """Masks and positions of a whole context, and the copies of them that are made again for every prompt batch."""
    batch = min(serving.prompt_batch, serving.context)
    return serving.context * (_TOKEN_BYTES + 7 * batch // 4)


def plain_attention_bytes(shape: ModelShape, serving: Serving) -> int:
    """What attention that is no node of its own costs beside :func:`activation_bytes`.

    Scores of one layer, masked scores and their softmax; keys and values repeated for every query head; and the
    mask, as truth values and as floats.
    """
    batch, width = min(serving.prompt_batch, serving.context), shape.heads * shape.head_dim
    per_token = 3 * shape.heads * batch + 2 * width + 4 * batch
    return _item_bytes(serving) * serving.context * per_token


def logit_bytes(shape: ModelShape, serving: Serving) -> int:
    """Logits of one prompt batch."""
    return _item_bytes(serving) * min(serving.prompt_batch, serving.context) * shape.vocabulary


def shorter_batch(shape: ModelShape, serving: Serving) -> Hole:
    """Logits of the longest last batch of a prompt, where those of the batch before leave a hole in the heap.

    onnxruntime-genai lets go of the ones before when it has made the others. A block of its own is gone then, and the
    others have not been written to yet. One on the heap lies below them and stays. glibc takes blocks from the heap
    that are no larger than one that was given back before: onnxruntime gives back the codes of every matrix that it
    packs.
    """
    batch = min(serving.prompt_batch, serving.context)
    rest, largest = min(batch - 1, serving.context - batch), logit_bytes(shape, serving)
    widest = max(shape.vocabulary, shape.ffn, shape.heads * shape.head_dim)
    if largest > min(_LARGEST_ON_HEAP, widest * shape.hidden):  # bytes of codes, at most one a number
        return Hole()
    return Hole(_item_bytes(serving) * rest * shape.vocabulary, largest)


def _heap_block(products: list[tuple[int, int, WeightType]]) -> int:
    """Return the largest block that packing the matrices gives back to the heap, of those that glibc counts."""
    given_back = [given_back_bytes(*product) for product in products]
    return max((nbytes for nbytes in given_back if nbytes <= _LARGEST_ON_HEAP), default=0)


def _item_bytes(serving: Serving) -> int:
    """Return the bytes of a number that the graph computes with."""
    return 2 if computed_in(serving) == "f16" else 4


def encoder_bytes(shape: ModelShape, serving: Serving) -> int:
    """Float32 activations of a batch of padded texts: attention scores and their softmax, or the wide FFN twice."""
    wide = max(2 * shape.heads * serving.context + 4 * shape.hidden, 2 * shape.ffn)
    return 4 * serving.prompt_batch * (wide + 4 * shape.hidden)


def _blocks(rows: int, columns: int, form: WeightType) -> int:
    return rows * ceil_div(columns, form.block)
