"""Compare how a runtime cuts text into tokens with how transformers does it, on strings that tokenizers get wrong.

An export whose runtime reads other tokens than the model was trained on answers worse without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from acip_export.artifacts.report import TokenDifference, Tokens
from acip_export.errors import DataError
from acip_export.text.packing import load_tokenizer

# What everybody types; a runtime that reads it otherwise is no runtime for the model.
PLAIN = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France?\nParis, of course!",
    "Prices rose by 3.5 % in 2024, from 1,999 to 2,069.",
    "def main(argv):\n    return sum(int(a) for a in argv[1:])\n",
)
# Blanks, line ends, contractions, scripts, signs, numbers, marks that combine, and what is nearly a special token.
NASTY = (
    "   leading,   trailing   ",
    "\n \n  \n   \n\t\t",
    "one\r\ntwo\rthree\n\n\nfour",
    "I'LL we'Re 'S DON'T it’s",
    "a\u00a0b\u2028c\u200bd\ufeffe",
    "Größe, naïve, ÉCOLE, ça va? ﬁn ½ ² Ⅳ",
    "e\u0301 n\u0303 a\u0308",
    "Привет, мир! Γειά σου. עברית العربية ١٢٣",
    "한국어 日本語のテキスト 汉字 ไทย",
    "👍🏽 👩‍💻 𝒳 \U0001f1eb\U0001f1f7",
    "12345678901234567890 0x1F 1e-9 3.14159",
    "camelCaseHTTPServer snake_case_name kebab-case ./path/to/file.txt",
    "<|endoftext|> <s>[INST] </s> <unk> <0x41> <|im_start|>user",
    '!!!??? ... --- ***bold*** $$x^2$$ `code` {"a": [1, 2]}',
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)
STRINGS = (*PLAIN, *NASTY)
_SHOWN = 3


def compare_tokens(found: Sequence[Sequence[int]] | None, model: Path) -> Tokens | None:
    """Compare a runtime's tokens of every string with transformers', special ones recognised and none put around it.

    Args:
        found: the runtime's, of :data:`STRINGS`; ``None``: it has no tokenizer.
        model: a directory with the tokenizer that transformers reads.

    Returns:
        ``None`` where the runtime has no tokenizer, or the model none.
    """
    if found is None:
        return None
    try:
        tokenizer = load_tokenizer(model)
    except DataError:
        return None
    different = []
    for text, tokens in zip(STRINGS, found, strict=True):
        expected = tuple(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])
        if tuple(tokens) != expected:
            different.append(TokenDifference(text, expected, tuple(tokens)))
    return Tokens(len(STRINGS), tuple(different))


def plain_text_failures(runtime: str, tokens: Tokens | None) -> list[str]:
    """Return a sentence where a runtime reads even plain text otherwise."""
    wrong = [] if tokens is None else [each for each in tokens.different if each.text in PLAIN]
    if not wrong:
        return []
    first = wrong[0]
    return [
        f"{runtime}: its tokens are not those of transformers, of {first.text!r} {_few(first.found)} instead of "
        f"{_few(first.expected)}: the tokenizer beside the model is not what this runtime makes of it"
    ]


def token_notes(runtime: str, tokens: Tokens | None) -> list[str]:
    """Return a sentence that names what a runtime reads otherwise, plain text left out."""
    odd = [] if tokens is None else [each.text for each in tokens.different if each.text not in PLAIN]
    if tokens is None or not odd:
        return []
    named = ", ".join(repr(text if len(text) < 40 else text[:36] + " ...") for text in odd[:_SHOWN])
    more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
    return [f"{runtime} cuts {len(odd)} of {tokens.texts} strings into other tokens than transformers: {named}{more}"]


def _few(tokens: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, tokens[:8]))}{', ...' if len(tokens) > 8 else ''}]"
