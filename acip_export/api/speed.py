"""How fast this machine is: models made for it are exported in every type, and run in the runtimes of each format."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import Plan, Serving
from acip_export.artifacts.report import Speed
from acip_export.artifacts.scores import CurvePoint, ModuleScores, RankedModel, RankedOn, ScoreFile
from acip_export.artifacts.speeds import RuntimeSpeed, SpeedTable
from acip_export.errors import MissingExtraError, UnsupportedError
from acip_export.formats.protocol import DEFAULT_BACKEND, ExportFormat
from acip_export.formats.registry import export_formats
from acip_export.machine import processors
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import task_of
from acip_export.planning import Problem, SearchSpace
from acip_export.planning.speed import Predictor
from acip_export.progress import Clock, ProgressCallback, silent

# Models of zeros: no kernel is faster for them, and quantizing them is quick.
_HIDDEN, _FFN, _LAYERS = 1024, 4096, 4
_SMALL, _FEW_LAYERS, _MANY_LAYERS = 256, 4, 20
_VOCABULARY, _LARGE_VOCABULARY = 512, 32_768
_PROMPT, _LONG_PROMPT, _NEW, _BATCH = 128, 1024, 16, 128
_REPETITIONS = 3
_HEAD_SIZE = 64
# Rates and overheads are each other's remainders: so often they are computed in turn.
_ROUNDS = 20
_NOTHING = RuntimeSpeed("", {}, {}, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0)
# llama.cpp knows pre-tokenizers by what they do.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def measure_speeds(progress: ProgressCallback = silent, names: Sequence[str] = ()) -> SpeedTable:
    """Measure every runtime of language models that is installed.

    Args:
        names: of formats; empty: all.
    """
    runtimes: dict[str, RuntimeSpeed] = {}
    for format in export_formats():
        if names and format.name not in names:
            continue
        try:
            runtimes |= _measure_format(format, progress)
        except MissingExtraError:
            continue
    return SpeedTable(platform.node() or "this machine", processors(), runtimes)


@dataclass(frozen=True)
class _Made:
    """An export of zeros, with what it was planned from."""

    plan: Plan
    problem: Problem
    export: Path


def _measure_format(format: ExportFormat, progress: ProgressCallback) -> dict[str, RuntimeSpeed]:
    layout = replace(format.layouts[0], low_rank=None, residual_pairs=())  # of dense matrices alone
    types = [t for t in format.choose_types(()) if not t.needs_importance]
    clock = Clock(f"speed of {format.name}", (len(types) + 4) * len(format.sessions), progress)
    from acip_export.materialization import materialize_bundle

    with TemporaryDirectory(prefix="acip-export-") as directory:
        place = Path(directory)

        def made(name: str, type_name: str, **sizes: int) -> _Made:
            checkpoint = _checkpoint(place / name, **sizes)
            space = SearchSpace(format, layout, (format.type(type_name),), DEFAULT_BACKEND, {}, "nearest")
            serving = Serving(_LONG_PROMPT + _NEW, next(iter(format.cache_types)), _BATCH, DEFAULT_BACKEND)
            scores = _nothing_known(checkpoint)
            problem = Problem.of(checkpoint, scores, space)
            plan = problem.largest("file", serving)
            materialize_bundle(checkpoint, scores, plan, place / f"{name}-bundle", round_trip=format.round_trip)
            export = place / f"{name}-export"
            export.mkdir()
            format.convert(Bundle.open(place / f"{name}-bundle"), export, silent)
            return _Made(plan, problem, export)

        base = next((t.name for t in types if t.name in ("q8_0", "int8")), types[0].name)
        small = {"hidden": _SMALL, "ffn": _SMALL}
        few = made("few", base, layers=_FEW_LAYERS, **small)
        many = made("many", base, layers=_MANY_LAYERS, **small)
        wide = made("wide", base, layers=_FEW_LAYERS, vocabulary=_LARGE_VOCABULARY, **small)
        by_type: dict[str, _Made] = {}
        for type_ in types:
            try:
                by_type[type_.name] = made(type_.name, type_.name)
            except UnsupportedError:
                continue  # no type of embeddings, or a quantizer that wants more than zeros
        found = {}
        for session in format.sessions:
            try:
                found[session.runtime] = _measure(session, few, many, wide, by_type, base, clock)
            except MissingExtraError:
                continue
    return found


def _measure(
    session: Any, few: _Made, many: _Made, wide: _Made, by_type: dict[str, _Made], base: str, clock: Clock
) -> RuntimeSpeed:
    """Run one runtime on all of them."""
    version = ""

    def timed(made: _Made, prompt: int = _PROMPT) -> Timed:
        nonlocal version
        with session.open(made.export, made.plan.serving) as opened:
            version = opened.name
            tokens = [1 + index % 200 for index in range(prompt)]
            speeds: list[Speed] = [opened.speed(tokens, _NEW) for _ in range(_REPETITIONS)]
        clock.advance()
        predictor = Predictor.of(made.problem, _NOTHING, made.plan.serving)
        matrices = [(d, m) for d in made.plan.tensors for m in predictor.matrices(d)]
        return Timed(
            prompt=min(1 / each.prefill for each in speeds),
            answer=min(1 / each.decode for each in speeds if each.decode),
            tokens=prompt,
            nbytes=sum(nbytes for _, (_, nbytes, _) in matrices),
            weights=sum(weights for d, (_, _, weights) in matrices if not predictor.is_head(d)),
            head=sum(weights for d, (_, _, weights) in matrices if predictor.is_head(d)),
            layers=predictor.shape.layers,
            hidden=predictor.shape.hidden,
            cache=predictor.kv_cache / made.plan.serving.context,
        )

    return fit(
        timed(few),
        timed(many),
        timed(many, _LONG_PROMPT),
        timed(wide),
        {name: timed(made) for name, made in by_type.items()},
        base,
        version,
    )


@dataclass(frozen=True)
class Timed:
    """A run: seconds a token of a prompt of ``tokens`` and of the answer after it, and what was computed for one.

    Attributes:
        nbytes: of matrices. weights, head: of the layers' and of the head's. cache: bytes a token of context.
    """

    prompt: float
    answer: float
    tokens: int
    nbytes: int
    weights: int
    head: int
    layers: int
    hidden: int
    cache: float


def fit(
    few: Timed, many: Timed, long: Timed, wide: Timed, by_type: Mapping[str, Timed], base: str, version: str
) -> RuntimeSpeed:
    """Tell apart what runs took: for every type's matrices, for a token, for a layer, for the cache.

    Args:
        few, many: small models of few and many layers of the type ``base``. long: the latter after a long prompt.
        wide: the former with a large vocabulary. by_type: large models.
    """
    layers, context = many.layers - few.layers, long.tokens - many.tokens
    cache_read = many.cache * context / _above_zero(long.answer - many.answer)
    attention = 2 * many.hidden * context * many.layers / _above_zero(long.prompt - many.prompt)
    read = {name: run.nbytes / run.answer for name, run in by_type.items()}
    compute = {name: 2 * run.weights / run.prompt for name, run in by_type.items()}
    token = layer = width = share = 0.0

    def beside(run: Timed) -> float:
        return run.answer - run.nbytes / read[base] - run.cache * run.tokens / cache_read

    def beside_prompt(run: Timed) -> float:
        overhead = (token + run.layers * layer) / min(_BATCH, run.tokens)
        attended = 2 * run.hidden * run.tokens * run.layers / attention
        return run.prompt - overhead - attended - 2 * (run.weights + share * run.head) / compute[base]

    for _ in range(_ROUNDS):
        layer = max(0.0, (beside(many) - beside(few)) / layers)
        token = max(0.0, beside(few) - few.layers * layer)
        for name, run in by_type.items():
            rest = run.answer - token - run.layers * layer - run.cache * run.tokens / cache_read
            read[name] = run.nbytes / max(rest, run.answer / 10)
        head = 2 * (wide.head - few.head) / compute[base]
        share = min(1.0, max(0.0, (wide.prompt - few.prompt) / head))
        width = max(0.0, (beside_prompt(many) - beside_prompt(few)) / layers / many.hidden)
        for name, run in by_type.items():
            overhead = (token + run.layers * layer) / min(_BATCH, run.tokens)
            attended = 2 * run.hidden * run.tokens * run.layers / attention
            rest = run.prompt - overhead - attended - width * run.hidden * run.layers
            compute[name] = 2 * (run.weights + share * run.head) / max(rest, run.prompt / 10)
    return RuntimeSpeed(version, read, compute, token, layer, width, cache_read, attention, share)


def _above_zero(seconds: float) -> float:
    """What is too short to be measured counts as a nanosecond."""
    return max(seconds, 1e-9)


def _checkpoint(
    place: Path, hidden: int = _HIDDEN, ffn: int = _FFN, layers: int = _LAYERS, vocabulary: int = _VOCABULARY
) -> Checkpoint:
    """Write a Llama of zeros, with a tokenizer of bytes."""
    from safetensors.numpy import save_file

    place.mkdir()
    heads = hidden // _HEAD_SIZE
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _HEAD_SIZE,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float16",
    }
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        tensors |= {f"{name}.self_attn.{each}_proj.weight": (hidden, hidden) for each in "qkvo"}
        tensors |= {f"{name}.mlp.{each}_proj.weight": (ffn, hidden) for each in ("gate", "up")}
        tensors[f"{name}.mlp.down_proj.weight"] = (hidden, ffn)
        tensors |= {f"{name}.{each}_layernorm.weight": (hidden,) for each in ("input", "post_attention")}
    save_file({name: np.zeros(shape, np.float16) for name, shape in tensors.items()}, place / "model.safetensors")
    _tokenizer(place)
    return Checkpoint.open(place)


def _tokenizer(place: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(place)


def _nothing_known(checkpoint: Checkpoint) -> ScoreFile:
    """Return scores that know nothing but the model: enough for plans without low rank."""
    zeros = {name: np.zeros(min(shape), np.float32) for name, shape in checkpoint.linear_modules.items()}
    modules = {
        name: ModuleScores(
            shape,
            zeros[name],
            zeros[name],
            zeros[name],
            zeros[name],
            0.0,
            np.ones(shape[1], np.float32),
            np.ones(shape[0], np.float32),
        )
        for name, shape in checkpoint.linear_modules.items()
    }
    return ScoreFile(
        model=RankedModel(checkpoint.name, checkpoint.fingerprint),
        task=task_of(checkpoint.config),
        algorithm={"name": "none", "basis": "svd"},
        data=RankedOn(source="none", sha256="0" * 64, tokens=0),
        versions={},
        curve=(CurvePoint(1.0, 0.0), CurvePoint(0.5, 1.0)),
        modules=modules,
        embedding_sensitivity={},
        second_moments={},
    )
