"""Cut a long text into pieces that have the tokens of the whole: tokenizing takes 200 bytes of memory for each of text.

In general no cut is safe. One is between a letter and a blank before a letter where text is split at one of the
patterns that are in wide use: nothing that they match holds both, what they match before it does not depend on what
comes next, and none looks back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from acip_export.model import split_patterns

# Characters of a piece, or a few more.
_PIECE = 1 << 17
_CUT = re.compile("(?<=[A-Za-z])(?= [A-Za-z])")
_PATTERNS = frozenset(
    (
        split_patterns.GPT2,
        split_patterns.GPT4O,
        split_patterns.LLAMA3,
        split_patterns.QWEN2,
        split_patterns.QWEN35,
        split_patterns.TEKKEN,
    )
)


def pieces(tokenizer: Any, text: str) -> Iterator[str]:
    """Yield the pieces of a text: without special tokens, theirs are together the tokens of the text.

    Args:
        tokenizer: of transformers. What it does to text beyond what is known to be safe leaves the text whole.
    """
    begin = 0
    if len(text) > 2 * _PIECE and _can_be_cut(tokenizer):
        while len(text) - begin > 2 * _PIECE and (cut := _CUT.search(text, begin + _PIECE)):
            yield text[begin : cut.start()]
            begin = cut.start()
    yield text[begin:]


def _can_be_cut(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE" or backend.model.dropout is not None:
        return False
    # One that swallows the blank behind it, or holds one, may lie across the cut.
    if any(token.rstrip or " " in token.content for token in backend.get_added_tokens_decoder().values()):
        return False
    try:
        normalizer, splitting = _settings(backend.normalizer), _settings(backend.pre_tokenizer)
    except Exception:  # tokenizers' own kind: a step that is written in Python
        return False
    # A blank and a letter behind it are composed with nothing before them.
    if normalizer.get("type", "NFC") != "NFC":
        return False
    *steps, last = splitting.get("pretokenizers", [splitting]) or [{}]
    # Behind it, blanks are letters.
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return False
    patterns = [_pattern(step) for step in steps if step["type"] != "Digits"]
    if last["use_regex"]:
        patterns.append(split_patterns.GPT2)
    return bool(patterns) and _PATTERNS.issuperset(patterns)


def _settings(step: Any) -> Mapping[str, Any]:
    """Return what ``tokenizer.json`` says of a step."""
    found: Mapping[str, Any] = {} if step is None else json.loads(step.__getstate__())
    return found


def _pattern(step: Mapping[str, Any]) -> str:
    """Return at what a step splits, or nothing that is known."""
    whole = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return str(step["pattern"].get("Regex", "")) if whole else ""
