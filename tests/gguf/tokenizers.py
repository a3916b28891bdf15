"""Real tokenizers of every kind, trained in a second: SentencePiece as its library makes it, BPE as tokenizers does."""

from __future__ import annotations

import ctypes
import functools
import io
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from converters.gguf.runtimes import c_api as llama_capi
from converters.gguf.writer import GgufWriter, Metadata, float32, string, uint32
from tests.support import CORPUS, SPLITS

ROOT = Path(__file__).parents[2]
VOCABULARY = 900
SPACE = "▁"


@functools.cache
def training_text() -> tuple[str, ...]:
    code = (ROOT / "samples/text/calibration.txt").read_text(encoding="utf-8")[:120_000]
    return (*code.splitlines(), *CORPUS * 20)


@functools.cache
def sentencepiece_model(kind: str, gemma: bool = False) -> bytes:
    """A trained ``tokenizer.model``: bpe as Llama 2 (or Gemma: no dummy prefix), or unigram."""
    out = io.BytesIO()
    bpe = kind == "bpe"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(training_text()),
        model_writer=out,
        model_type=kind,
        vocab_size=VOCABULARY,
        byte_fallback=bpe,
        normalization_rule_name="identity" if bpe else "nmt_nfkc",
        add_dummy_prefix=not gemma,
        remove_extra_whitespaces=not bpe,
        split_digits=True,
        allow_whitespace_only_pieces=bpe,
        character_coverage=0.999,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


def processor(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def pieces(model: bytes) -> list[tuple[str, float]]:
    spm = processor(model)
    return [(spm.IdToPiece(number), spm.GetScore(number)) for number in range(spm.GetPieceSize())]


# name -> (normalizer, pre-tokenizer), as the families' own tokenizer.json files have them
STYLES: dict[str, tuple[Any, Any]] = {
    "llama2": (
        normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]),
        None,
    ),
    "gemma": (normalizers.Replace(" ", SPACE), pre_tokenizers.Split(" ", "merged_with_previous")),
    "mistral": (None, pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)),
}
STYLES["phi3"] = STYLES["llama2"]


def sentencepiece_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """``tokenizer.json`` from a SentencePiece BPE, with the pairs that transformers' converter makes of it."""
    found = pieces(sentencepiece_model("bpe", gemma=style == "gemma"))
    vocabulary = {piece: number for number, (piece, _) in enumerate(found)}
    merges = generate_merges(vocabulary, dict(found))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    normalizer, pre = STYLES[style]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    phi3 = style == "phi3"
    plain, own = ["<unk>", "<s>"], ["<start_of_turn>", "<end_of_turn>"]
    if phi3:
        plain, own = [*plain, "<|endoftext|>"], ["<|user|>", "<|end|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in plain])
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False, special=not phi3, rstrip=phi3)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True, rstrip=phi3) for token in own])
    words = ["<tool>"] if phi3 else ["<tool>", "\n\n"]
    tokenizer.add_tokens([AddedToken(word, normalized=False, rstrip=phi3) for word in words])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """``tokenizer.json`` of a unigram model, with the steps of transformers' converter."""
    model = sentencepiece_model("unigram")
    parsed = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    tokenizer = Tokenizer(models.Unigram(pieces(model), unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Strip(left=False, right=True),
            normalizers.Precompiled(parsed.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), SPACE),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


# The patterns of other byte-level tokenizers; those of Llama 3 and Qwen 2 are in tests/support.py.
UPPER, LOWER, START = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\r\n\p{L}\p{N}]?"
END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
BYTE_LEVEL: dict[str, tuple[list[Any], bool]] = {
    "llama-bpe": ([SPLITS["llama-bpe"]], True),
    "dbrx": ([SPLITS["llama-bpe"]], False),
    "qwen2": ([SPLITS["qwen2"]], False),
    "gpt-2": ([], False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True)], False),
    "tekken": ([f"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|" + r"\p{N}" + END], True),
    "gpt-4o": (
        [f"{START}{UPPER}*{LOWER}+{SUFFIX}|{START}{UPPER}+{LOWER}*{SUFFIX}|" + r"\p{N}{1,3}" + END],
        False,
    ),
}


@functools.cache
def byte_level_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A trained byte-level BPE whose pre-tokenizer llama.cpp calls ``name``."""
    splits, whole_words = BYTE_LEVEL[name]
    steps = [pre_tokenizers.Split(Regex(s), "isolated") if isinstance(s, str) else s for s in splits]
    regex = not any(isinstance(step, str) for step in splits)
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=regex)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text()[::8], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


# Code, several scripts, emoji, runs of blanks, and what tokenizers get wrong.
TEXTS = (
    *CORPUS,
    "x = {'a': [1, 22, 333, 4444]}\r\n\r\n\tif x is not None:\n\t\t  return  0x1F  # ünïcødé\n\n",
    "I'LL we'Re 'S DON'T 'd\u00a0nbsp \u2028 line 한국어 ไทย עברית 𝒳 ½ ² Ⅳ ١٢٣ camelCaseHTTPServer",
    "   leading,   trailing   ",
    "\n \n  \n   \n",
    "<tool>{}<tool>  a<0x41>",
)


def special_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Special tokens in the midst of text, blanks around them."""
    specials = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
    joined = "".join(f"{token}word {number}\n" for number, token in enumerate(specials))
    return [joined, " ".join(specials), "\n\n".join(specials), "a<|user|>\n b <|end|>\n\n  c<|endoftext|> d"]


class Vocabulary:
    """llama.cpp's own tokenizer, from a GGUF file that holds ``metadata`` and no weights."""

    def __init__(self, metadata: Metadata, file: Path, name: str = "test") -> None:
        found = llama_capi.find()
        assert found is not None, "no llama.cpp library"
        self._api = found[0]
        sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
        keys = {
            "general.architecture": string("llama"),
            "general.name": string(name),
            **{f"llama.{key}": uint32(64) for key in sizes},
            "llama.attention.layer_norm_rms_epsilon": float32(1e-6),
            **metadata,
        }
        with GgufWriter(file, keys, []):
            pass
        parameters = self._api.llama_model_default_params()
        parameters.vocab_only = True
        with llama_capi.LOG.listen(self._api) as log:
            self._model = self._api.llama_model_load_from_file(str(file).encode(), parameters)
        assert self._model, "\n".join(log)
        self._vocabulary = self._api.llama_model_get_vocab(self._model)

    def tokenize(self, text: str, wrap: bool = False) -> list[int]:
        data = text.encode("utf-8")
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        count = self._api.llama_tokenize(self._vocabulary, data, len(data), buffer, len(buffer), wrap, True)
        return list(buffer[:count])

    def ends(self, token: int) -> bool:
        """Whether an answer ends at ``token``."""
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token))

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._api.llama_model_free(self._model)
