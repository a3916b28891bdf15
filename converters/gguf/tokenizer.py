"""Byte-level BPE from ``tokenizer.json`` to GGUF keys.

llama.cpp does not store the pre-tokenizer's pattern but a name (``tokenizer.ggml.pre``) for patterns compiled into it.
The name is found here by the pattern itself, so that a retrained vocabulary works as well; llama.cpp's own converter
hashes the tokens of a test string instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any

from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.files import read_json_object
from converters.gguf.writer import Metadata, Value, boolean, int32s, string, strings, uint32

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"

# (patterns in order of application, whether whole words skip the merges) -> name in llama.cpp (llama-vocab.cpp).
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",  # the same pattern in a variant that does not skip merges
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
}


@dataclass(frozen=True)
class _Special:
    """Ids of the special tokens that the runtime acts on; ``None`` where the model has none."""

    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None


def tokenizer_metadata(model: Path, config: Mapping[str, Any], vocabulary: int) -> Metadata:
    """The ``tokenizer.*`` keys. Cached: a plan asks for them many times.

    Args:
        vocabulary: rows of the embedding; the tokens are padded to it.

    Raises:
        CheckpointError: no ``tokenizer.json``, or a damaged one.
        UnsupportedError: llama.cpp would tokenize differently.
    """
    file = model / "tokenizer.json"
    try:
        stamp = file.stat()
    except OSError:
        raise CheckpointError(
            f"{model} has no tokenizer.json; save the tokenizer with transformers' save_pretrained (fast tokenizer)"
        ) from None
    ids = json.dumps({key: config.get(f"{key}_token_id") for key in ("bos", "eos", "pad")})
    return _metadata(model, ids, vocabulary, (stamp.st_mtime_ns, stamp.st_size))


@lru_cache(maxsize=4)
def _metadata(model: Path, config_ids: str, vocabulary: int, _stamp: tuple[int, int]) -> Metadata:
    tokenizer = read_json_object(model / "tokenizer.json", CheckpointError)
    options = (
        read_json_object(model / "tokenizer_config.json", CheckpointError)
        if (model / "tokenizer_config.json").is_file()
        else {}
    )
    try:
        prefix, suffix = _template(tokenizer.get("post_processor"))
        tokens, types = _tokens(tokenizer, vocabulary)
        ids = {token: index for index, token in enumerate(tokens)}
        special = _special(options, json.loads(config_ids), ids, prefix)
        metadata: dict[str, Value] = {
            "tokenizer.ggml.model": string("gpt2"),
            "tokenizer.ggml.pre": string(_pre_tokenizer(tokenizer)),
            "tokenizer.ggml.tokens": strings(tokens),
            "tokenizer.ggml.token_type": int32s(types),
            "tokenizer.ggml.merges": strings(_merges(tokenizer)),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{model / 'tokenizer.json'} is damaged or of an unknown form: {error!r}") from error
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = getattr(special, name)
        if number is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = uint32(number)
    metadata["tokenizer.ggml.add_bos_token"] = boolean(prefix is not None)
    metadata["tokenizer.ggml.add_eos_token"] = boolean(suffix is not None)
    template = _chat_template(model, options)
    if template:
        metadata["tokenizer.chat_template"] = string(template)
    return metadata


def _pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or not _is_byte_level(tokenizer):
        raise UnsupportedError(
            "the tokenizer is no byte-level BPE; the GGUF converter writes only those (Llama 3, Qwen, GPT-2, SmolLM)"
        )
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp does not normalize; text in the wild is NFC
        raise UnsupportedError(f"the tokenizer normalizes its input ({normalizer}), which llama.cpp would not do")
    patterns = _patterns(tokenizer["pre_tokenizer"])
    whole_words = bool(model.get("ignore_merges"))
    name = _PRE_TOKENIZERS.get((patterns, whole_words))
    if name is None:
        found = " then ".join(patterns)
        closest = max(_PRE_TOKENIZERS, key=lambda known: SequenceMatcher(None, " then ".join(known[0]), found).ratio())
        raise UnsupportedError(
            f"llama.cpp has no pre-tokenizer for the pattern {found!r} (ignore_merges={whole_words}); the closest is "
            f"{_PRE_TOKENIZERS[closest]!r}: {' then '.join(closest[0])!r} (ignore_merges={closest[1]})"
        )
    return name


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    steps = _steps(tokenizer.get("pre_tokenizer"))
    return bool(steps) and steps[-1]["type"] == "ByteLevel"


def _patterns(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """What splits the text, in order, as regular expressions."""
    patterns: list[str] = []
    for step in _steps(pre_tokenizer):
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert") and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(_DIGIT)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [_GPT2] if step.get("use_regex", True) else []
        else:
            raise UnsupportedError(f"the tokenizer's pre-tokenizer step {dict(step)} has no counterpart in llama.cpp")
    return tuple(patterns)


def _tokens(tokenizer: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token by id and its type, padded to ``vocabulary``."""
    by_id = {int(number): (token, _NORMAL) for token, number in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens", ()):
        by_id[int(added["id"])] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    if by_id and max(by_id) >= vocabulary:
        raise UnsupportedError(f"the tokenizer has token {max(by_id)}, but the model has {vocabulary} embeddings only")
    rows = [by_id.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(vocabulary)]
    return [token for token, _ in rows], [kind for _, kind in rows]


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]


def _template(post_processor: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """Special tokens that are put before and after every text."""
    if post_processor is None:
        return None, None
    steps = post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]
    before: list[str] = []
    after: list[str] = []
    for step in steps:
        if step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            raise UnsupportedError(f"the tokenizer's post-processor {step['type']} has no counterpart in llama.cpp")
        side = before
        for piece in step["single"]:
            if "Sequence" in piece:
                side = after
            else:
                side.append(piece["SpecialToken"]["id"])
    if len(before) > 1 or len(after) > 1:
        raise UnsupportedError(f"the tokenizer wraps text in {before + after}; llama.cpp adds one token on each side")
    return (before[0] if before else None), (after[0] if after else None)


def _special(
    options: Mapping[str, Any], config_ids: Mapping[str, Any], ids: Mapping[str, int], prefix: str | None
) -> _Special:
    def find(name: str) -> int | None:
        token = options.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            return ids[token]
        number = config_ids.get(name)
        number = number[0] if isinstance(number, list) and number else number
        return int(number) if isinstance(number, int) and 0 <= number < len(ids) else None

    eos = find("eos")
    bos = ids[prefix] if prefix is not None else find("bos")
    # Without the key llama.cpp takes token 11 for the beginning of text.
    return _Special(bos if bos is not None else eos, eos, find("unk"), find("pad"))


def _chat_template(model: Path, options: Mapping[str, Any]) -> str | None:
    file = model / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = options.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
