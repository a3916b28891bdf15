"""The scales of a KV cache in 8 or 4 bits: from the keys and values of text that the export itself writes.

The graph with a cache in floats runs on the export's own numbers, whatever rounding and scaling of channels have made
of them. Nothing has to be known of a text: on a real model its own costs as little as the one that it was ranked on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from acip_export.errors import VerificationError
from acip_export.progress import Progress, ProgressCallback
from converters.onnx.backends import ROUNDED_CACHES
from converters.onnx.companion_files import DATA_FILE, GENAI_CONFIG
from converters.onnx.graph.rounded_cache import KEYS, PAST_KEYS, VALUES, attentions

Floats = NDArray[np.float32]

# Texts side by side and tokens of each.
_TEXTS, _TOKENS = 4, 128
# What a channel is scaled to: its largest number and a quarter more in 8 bits, whose steps are fine enough; in 4 bits
# no more than three times its root mean square, beyond which little is left to lose.
_MARGIN_8_BITS, _DEVIATIONS_4_BITS = 1.25, 3.0
_LEAST_SCALE = 1e-8


@dataclass(frozen=True)
class _Channels:
    """Of one layer's keys or values, by KV head and channel.

    Attributes:
        largest: of the absolute numbers. mean_square: of all numbers.
    """

    largest: Floats
    mean_square: Floats

    def scales(self, bits: int) -> Floats:
        """Return what a code is multiplied with."""
        reach = self.largest * _MARGIN_8_BITS
        if bits == 4:
            reach = np.minimum(self.largest, _DEVIATIONS_4_BITS * np.sqrt(self.mean_square))
        scales: Floats = np.maximum(reach / (2 ** (bits - 1) - 1), _LEAST_SCALE).astype(np.float32)
        return scales.reshape(-1)


def calibrate_cache(export: Path, graph: bytes, cache_type: str, progress: ProgressCallback) -> None:
    """Write the scales into the data file of ``export``, which ends with them.

    Args:
        graph: that of the export with a cache in floats.

    Raises:
        VerificationError: onnxruntime refuses it.
    """
    bits = ROUNDED_CACHES[cache_type]
    scales = [channels.scales(bits) for channels in _measured(export, graph, progress)]
    data = np.concatenate(scales).tobytes()
    with (export / DATA_FILE).open("r+b") as stream:
        stream.seek(-len(data), 2)
        stream.write(data)


def _measured(export: Path, graph: bytes, progress: ProgressCallback) -> Iterator[_Channels]:
    """Yield keys and values of one layer after the other."""
    model = onnx.load_model_from_string(graph)
    caches = _written(export, graph, progress)
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in attentions(model):
        for position, past in ((KEYS, PAST_KEYS), (VALUES, PAST_KEYS + 1)):
            numbers: Floats = caches[node.input[past]].numpy()
            largest, squares = np.abs(numbers).max((0, 2)), np.square(numbers).mean((0, 2))
            maker = makers[node.input[position]]
            if maker.op_type == "RotaryEmbedding":
                one, other = _pairs(maker, largest.shape[1])
                pairs = np.square(numbers[..., one]) + np.square(numbers[..., other])
                # Further on in a context a pair of channels is turned until one of them has all of it.
                largest[:, one] = largest[:, other] = np.sqrt(pairs.max((0, 2)))
                squares[:, one] = squares[:, other] = pairs.mean((0, 2)) / 2
            yield _Channels(largest, squares)


def _pairs(rotary: onnx.NodeProto, width: int) -> tuple[slice, slice]:
    """Return the channels that a rotary embedding turns with each other."""
    attributes = {attribute.name: attribute.i for attribute in rotary.attribute}
    turned = attributes.get("rotary_embedding_dim") or width
    if attributes.get("interleaved"):
        return slice(0, turned, 2), slice(1, turned, 2)
    return slice(0, turned // 2), slice(turned // 2, turned)


def _written(export: Path, graph: bytes, progress: ProgressCallback) -> dict[str, Any]:
    """Let the model write, each token drawn by its probability, and return what attention keeps of that."""
    import onnxruntime

    config = json.loads((export / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]
    options = onnxruntime.SessionOptions()
    place = str((export / DATA_FILE).parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", place)
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes are private, and all mean that the graph does not run
        raise VerificationError(f"onnxruntime cannot open the graph of {export}: {error}") from error
    count = min(_TOKENS, int(config["context_length"]))
    named = {node.name: node for node in session.get_inputs()}
    caches = {
        name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            [_TEXTS, node.shape[1], count, node.shape[3]], np.float32
        )
        for name, node in named.items()
        if name.startswith("past_key_values.")
    }
    binding = session.io_binding()
    binding.bind_output("logits", "cpu")  # first, so that it is the first of the outputs
    for name, cache in caches.items():
        binding.bind_ortvalue_input(name, cache)
        binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), cache)
    random = np.random.default_rng(0)
    tokens = np.full(_TEXTS, int(config["bos_token_id"]))
    for index in range(count):
        progress(Progress("KV cache scales", index, count, "text of the model's own"))
        binding.bind_cpu_input("input_ids", tokens[:, None].astype(np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((_TEXTS, index + 1), np.int64))
        if "position_ids" in named:
            binding.bind_cpu_input("position_ids", np.full((_TEXTS, 1), index, np.int64))
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        scores = binding.get_outputs()[0].numpy()[:, -1].astype(np.float64)
        # The largest of logits and Gumbel's noise is a token drawn by its probability.
        tokens = (scores + random.gumbel(size=scores.shape)).argmax(-1)
    progress(Progress("KV cache scales", count, count, "text of the model's own"))
    return caches
