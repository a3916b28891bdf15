"""Every check of a checkpoint that does not depend on the format of the export, in one function.

A ranking takes hours: what an export would refuse afterwards is refused before it starts, with the same words and the
same exit code for every format. What one format alone cannot express is that format's to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.io.atomic import read_json_object
from acip_export.io.placeholders import refuse_placeholder
from acip_export.io.stamps import Stamp, stamp_of
from acip_export.model.architectures import architecture_of
from acip_export.model.checkpoint import TOKENIZER_FILES, Checkpoint
from acip_export.model.config_fields import check_generation_config
from acip_export.model.encoder import is_encoder, pools_tokens, sentence_settings
from acip_export.model.expected_tensors import Shapes, bias_key, expected_tensors
from acip_export.model.rope import rope_fields
from acip_export.model.tensor_names import HEAD
from acip_export.model.tokenizer_files import check_template, check_tokenizer, mended_by_transformers

# Types of numbers that dense weights are stored in.
_DENSE = ("F16", "BF16", "F32", "F64")
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Lines of a table of differences; a model of another size differs everywhere.
_MOST_LINES = 24
_TOKEN_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of a copy of a masked language model's vector; old checkpoints lack it, new ones have it.
_OPTIONAL = frozenset({"cls.predictions.decoder.bias"})
# Files that transformers makes a tokenizer.json of.
_OLD_TOKENIZERS = ("vocab.json", "merges.txt", "vocab.txt")
_SAVE_TOKENIZER = (
    "python -c \"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('.').save_pretrained('.')\""
)


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Refuse now what ranking or any export would refuse later. Reads headers and small files only.

    Raises:
        CheckpointError: files are missing, damaged or no files of a model; ``config.json`` and weights disagree.
        UnsupportedError: quantized weights, attention in both directions, embeddings made by a decoder, and what
            :attr:`Checkpoint.shape` and :attr:`Checkpoint.encoder` refuse.
    """
    _refuse_quantized(checkpoint)
    _check_attention(checkpoint)
    if checkpoint.encoder is None:
        _refuse_embedding_decoder(checkpoint)
    else:
        sentence_settings(checkpoint.path)
    _check_tensors(checkpoint)
    if not checkpoint.linear_modules:
        raise UnsupportedError(
            f"{checkpoint.path} has no linear layers in numbered blocks, so there is nothing to rank"
        )
    _check_tokenizer(checkpoint.path)
    _check_pattern(checkpoint)
    _check_tokens(checkpoint)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    advice = "export the original model; this tool quantizes by itself"
    settings = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    if settings:
        method = settings.get("quant_method") or settings.get("quantization_method") or "of an unknown kind"
        raise UnsupportedError(
            f"{checkpoint.path}: the weights are quantized (quantization_config in config.json: {method}); {advice}"
        )
    name = next((name for name, info in checkpoint.tensors.items() if info.dtype not in _DENSE), None)
    if name is not None:
        raise UnsupportedError(
            f"{checkpoint.path}: the weights are quantized, although config.json does not say so ({name} is stored as "
            f"{checkpoint.tensors[name].dtype}, expected {', '.join(_DENSE)}); {advice}"
        )


def _check_attention(checkpoint: Checkpoint) -> None:
    config, shape, file = checkpoint.config, checkpoint.shape, checkpoint.path / "config.json"
    if is_encoder(config):
        if config.get("is_decoder"):
            raise UnsupportedError(f"{file}: is_decoder makes an encoder look back only, which no export does")
    else:
        bidirectional = {"use_bidirectional_attention": True, "is_causal": False}
        key = next((key for key, value in bidirectional.items() if config.get(key) is value), None)
        if key is not None:
            raise UnsupportedError(
                f"{file}: {key} is {str(config[key]).lower()}, so that tokens attend in both directions; decoders are "
                "exported with attention that looks back only"
            )
        rope = rope_fields(config)
        if expected_tensors(config, shape, 0) is not None and _scales_a_part(config, rope):
            raise CheckpointError(
                f"{file}: partial_rotary_factor {rope['partial_rotary_factor']} with positions of the kind "
                f"{rope['rope_type']!r}: transformers cannot compute that for a {config['model_type']}.\n"
                "Remove the key if the model was trained without it"
            )
    if shape.heads % shape.kv_heads:
        raise CheckpointError(
            f"{file}: num_attention_heads {shape.heads} is no multiple of num_key_value_heads {shape.kv_heads}"
        )


def _scales_a_part(config: Mapping[str, Any], rope: Mapping[str, Any]) -> bool:
    return not architecture_of(config).rotary.rotates_parts and float(rope["partial_rotary_factor"]) != 1


def _refuse_embedding_decoder(checkpoint: Checkpoint) -> None:
    """Embedding models such as Qwen3-Embedding: saved without a head, their last token pooled."""
    base = "embed_tokens.weight" in checkpoint.tensors and HEAD not in checkpoint.tensors
    if base or pools_tokens(checkpoint.path):
        how = "no tensor's name starts with  model." if base else "modules.json pools its tokens"
        raise UnsupportedError(
            f"{checkpoint.path} is a decoder that makes embeddings ({how}); decoders are exported to generate text, "
            "and embeddings with BERT encoders only"
        )


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Names and shapes of the weights against those that ``config.json`` promises, all differences in one table."""
    config, shape = checkpoint.config, checkpoint.shape
    stored: Shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    layers, known = _layers(stored), expected_tensors(config, shape, 0) is not None
    # Of unknown models we know only that a layer has tensors.
    if shape.layers != layers if known else shape.layers > len(stored):
        raise CheckpointError(
            f"{checkpoint.path}: config.json has num_hidden_layers {shape.layers}, the weights have {layers} layers; "
            "put the config.json that belongs to the weights beside them, or fetch the missing weights"
        )
    expected, optional = expected_tensors(config, shape, shape.layers), _OPTIONAL
    if expected is None:
        from acip_export.model.torch_model import expected_parameters

        expected, optional = expected_parameters(config)
    wrapped = _wrapping(stored, expected)
    if wrapped:
        raise CheckpointError(
            f"{checkpoint.path}: every tensor's name starts with {wrapped!r}, which a wrapper around the model added; "
            "save the model itself with save_pretrained"
        )
    lines = list(_differences(config, stored, expected, optional))
    if not lines:
        return
    more = [f"  and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    sizes = (
        f"hidden_size {shape.hidden}, intermediate_size {shape.ffn}, num_attention_heads {shape.heads}, "
        f"num_key_value_heads {shape.kv_heads}, head_dim {shape.head_dim}, vocab_size {shape.vocabulary}, "
        f"tie_word_embeddings {str(shape.tied_embeddings).lower()}"
    )
    raise CheckpointError(
        "\n".join(
            [
                f"{checkpoint.path}: the weights are not those that config.json promises:",
                *lines[:_MOST_LINES],
                *more,
                f"config.json has {sizes}. Correct it, or save the model again with save_pretrained",
            ]
        )
    )


def _layers(stored: Shapes) -> int:
    """Layers of the longest numbered list of blocks."""
    numbers: dict[str, set[str]] = {}
    for name in stored:
        found = _LAYER_NUMBER.search(name)
        if found:
            numbers.setdefault(name[: found.start()], set()).add(found[0])
    return max(map(len, numbers.values()), default=0)


def _wrapping(stored: Shapes, expected: Shapes) -> str | None:
    """What stands before every expected name in the weights."""
    first = next(iter(expected))
    found = next((name for name in stored if name.endswith(f".{first}")), None)
    prefix = None if found is None else found.removesuffix(first)
    return prefix if prefix and all(name.startswith(prefix) for name in stored) else None


def _differences(
    config: Mapping[str, Any], stored: Shapes, expected: Shapes, optional: frozenset[str]
) -> Iterator[str]:
    """A line for each difference; the same one in several layers is one."""
    groups: dict[tuple[str, str], int] = {}
    for name in dict.fromkeys((*expected, *stored)):
        found, wanted = stored.get(name), expected.get(name)
        if found == wanted or (name in optional and (found is None or wanted is None)):
            continue
        if found is None:
            text = f"missing, expected {_shown(wanted)}"
        elif wanted is None:
            text = f"{_shown(found)} too many"
        else:
            text = f"{_shown(found)}, expected {_shown(wanted)}"
        if name.endswith(".bias") and None in (found, wanted):
            text += _about_bias(config, name)
        key = _LAYER_NUMBER.sub("*", name), text
        groups[key] = groups.get(key, 0) + 1
    width = max((len(name) for name, _ in groups), default=0)
    for (name, text), count in groups.items():
        yield f"  {name:<{width}}  {text}" + (f"  (in {count} layers)" if count > 1 else "")


def _shown(shape: tuple[int, ...] | None) -> str:
    return "×".join(map(str, shape or ()))


def _about_bias(config: Mapping[str, Any], name: str) -> str:
    key = bias_key(config, name)
    if key is None:
        return ""
    return f": config.json has {key} {str(bool(config.get(key))).lower()}"


def _check_tokenizer(model: Path) -> None:
    files = {name: model / name for name in TOKENIZER_FILES if (model / name).is_file()}
    for file in files.values():
        refuse_placeholder(file, CheckpointError)
        if file.suffix == ".json":
            _check_json(file, stamp_of(file))
        elif file.suffix in (".jinja", ".txt"):
            _check_text(file)
    if not {"tokenizer.json", "tokenizer.model"} & files.keys():
        found = " and ".join(name for name in _OLD_TOKENIZERS if name in files)
        raise CheckpointError(
            f"{model} has {found + ', but ' if found else ''}no tokenizer.json, which exports need. Make it with\n"
            f"{_SAVE_TOKENIZER}"
        )
    _check_template(model, tuple(map(stamp_of, files.values())))


@lru_cache(maxsize=64)
def _check_json(file: Path, stamp: Stamp | None) -> None:  # noqa: ARG001 - part of the key
    """A real vocabulary takes a tenth of a second to parse, and planning asks often."""
    data = read_json_object(file, CheckpointError)
    if file.name == "generation_config.json":
        check_generation_config(file, data)
    if file.name == "tokenizer.json":
        check_tokenizer(file, data)


@lru_cache(maxsize=64)
def _check_template(model: Path, stamps: tuple[Stamp | None, ...]) -> None:  # noqa: ARG001 - part of the key
    """It takes a process."""
    check_template(model)


def _check_text(file: Path) -> None:
    try:
        file.read_text(encoding="utf-8")
    except (OSError, ValueError) as reason:
        raise CheckpointError(f"{file} is no UTF-8 text: {reason}") from reason


def _check_pattern(checkpoint: Checkpoint) -> None:
    options = checkpoint.path / "tokenizer_config.json"
    file = checkpoint.path / "tokenizer.json"
    settings = read_json_object(options, CheckpointError) if options.is_file() and file.is_file() else {}
    if not settings.get("fix_mistral_regex"):  # a large file is not read for nothing
        return
    try:
        mended = mended_by_transformers(read_json_object(file, CheckpointError), settings, checkpoint.config)
    except (AttributeError, KeyError, TypeError) as reason:
        raise CheckpointError(f"{file} is no tokenizer: its pre_tokenizer is malformed ({reason!r})") from reason
    if mended:
        raise CheckpointError(
            f"{options} has fix_mistral_regex: transformers splits text at another pattern than {file} says, and "
            f"other programs do not. Write the mended one with\n{_SAVE_TOKENIZER}"
        )


def _check_tokens(checkpoint: Checkpoint) -> None:
    """Special tokens are rows of the embedding."""
    vocabulary = checkpoint.shape.vocabulary
    generation = checkpoint.path / "generation_config.json"
    sources = {checkpoint.path / "config.json": checkpoint.config}
    if generation.is_file():
        sources[generation] = read_json_object(generation, CheckpointError)
    for file, config in sources.items():
        for role in _TOKEN_ROLES:
            value = config.get(role)
            for token in value if isinstance(value, tuple) else () if value is None else (value,):
                if token >= vocabulary:
                    raise CheckpointError(
                        f"{file}: {role} names token {token}, but the model has {vocabulary} embeddings; "
                        "correct the number, or remove it"
                    )
