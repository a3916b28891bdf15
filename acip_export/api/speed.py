"""How fast this machine is: models of random numbers in every type, run in the runtimes of each format."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np

from acip_export.artifacts.plan import Serving, TensorDecision
from acip_export.artifacts.report import Speed
from acip_export.artifacts.speeds import LEAST_ERROR, RuntimeSpeed, SpeedTable
from acip_export.errors import MissingExtraError, OutputError, UnsupportedError
from acip_export.formats.protocol import DEFAULT_BACKEND, ExportFormat
from acip_export.formats.registry import export_format, format_names
from acip_export.io.atomic import NO_ROOM
from acip_export.machine import processors
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import is_embedding
from acip_export.planning.speed import products
from acip_export.planning.speed_fit import Timed, fit
from acip_export.progress import Clock, ProgressCallback, silent
from acip_export.units import ceil_div


@dataclass(frozen=True)
class Sizes:
    """Of a model."""

    hidden: int
    ffn: int
    layers: int
    vocabulary: int = 512


# Models that the caches of single cores hold, that those of a processor hold, and that are read from memory: of the
# last, as many layers as have so many bytes, within bounds.
_SMALL, _CACHED, _LARGE = Sizes(256, 512, 4), Sizes(512, 1536, 4), Sizes(2048, 5632, 2)
_LARGE_BYTES, _MOST_LAYERS = 150 * 10**6, 8
# What takes long beside matrices: a token, a layer, a head, the cache, and a layer that is read from memory.
_FEW, _MANY, _WIDE = Sizes(128, 256, 2), Sizes(128, 256, 14), Sizes(128, 256, 2, vocabulary=32_768)
_DEEP, _NARROW = Sizes(256, 512, 14), Sizes(512, 1536, 24)
_PROMPT, _LONG_PROMPT, _NEW, _BATCH = 64, 512, 2, 128
# All runs together take about as long; each is repeated at least so often, in passes far from each other: what slows a
# machine down for a second must not slow down one type alone.
_SECONDS, _REPEATS, _PASSES = 36.0, 2, 2
# Tokens of small models take a fraction of a millisecond, and uneven ones.
_OFTEN = 10
# Tokens of a first prompt that is not timed. What a longer one allocates is in the time of the next, which is not the
# shortest.
_WARM_UP = 8
_HEAD_SIZE = 64


def measure_speeds(progress: ProgressCallback = silent, names: Sequence[str] = ()) -> SpeedTable:
    """Measure every runtime of language models that is installed.

    Args:
        names: of formats; empty: all.

    Raises:
        MissingExtraError, UnsupportedError: of a format that was named.
        OutputError: the system's directory for temporary files has no room for the models.
    """
    runtimes: dict[str, RuntimeSpeed] = {}
    known = names or format_names()
    for name in known:
        try:
            runtimes |= _measure_format(export_format(name), progress, _SECONDS / len(known))
        except (MissingExtraError, UnsupportedError):
            if names:
                raise
    return SpeedTable(platform.node() or "this machine", processors(), runtimes)


@dataclass(frozen=True)
class _Made:
    """An export of random numbers."""

    format: ExportFormat
    checkpoint: Checkpoint
    decisions: tuple[TensorDecision, ...]
    serving: Serving
    path: Path

    def write(self) -> None:
        """Write it, to stay.

        Raises:
            UnsupportedError: matrices cannot be of this type.
        """
        format, serving = self.format, self.serving
        format.prepare(self.checkpoint, DEFAULT_BACKEND, serving.context, silent)
        self.path.mkdir()
        format.imitate(self.checkpoint, format.layouts[0].name, self.decisions, serving, self.path)

    @contextmanager
    def there(self) -> Iterator[None]:
        """Write what is not there for the time of the block: the large ones of all types together are gigabytes."""
        if self.path.exists():
            yield
            return
        self.write()
        try:
            yield
        finally:
            # Where files in use cannot be removed, they go with the directory of all.
            shutil.rmtree(self.path, ignore_errors=True)


def _measure_format(format: ExportFormat, progress: ProgressCallback, seconds: float) -> dict[str, RuntimeSpeed]:
    bases = [layout.base_type for layout in format.layouts if layout.base_type is not None]
    types = tuple(dict.fromkeys((*format.types, *format.embedding_types, *format.narrow_types, *bases)))
    with _room() as directory:
        maker = _Maker(directory, format)
        others = [name for name in format.cache_types if name != next(iter(format.cache_types))]
        clock = Clock(f"exports of {format.name}", 2 * len(types) + 5 + len(others), progress)
        fixed, caches = [], {}
        by_type: dict[str, list[_Run]] = {}
        for sizes in (_FEW, _MANY, _WIDE, _NARROW, _DEEP):
            fixed.append(_Run(maker.written(sizes), repeats=_OFTEN))
            clock.advance()
        deep = fixed[-1].made
        fixed.append(_Run(deep, _LONG_PROMPT))
        for name in types:
            for sizes in (_SMALL, _CACHED):
                with suppress(UnsupportedError):
                    run = _Run(maker.written(sizes, name), repeats=_OFTEN)
                    by_type.setdefault(name, []).append(run)
                clock.advance()
            if name in by_type:  # whether matrices can be of a type does not depend on their sizes
                by_type[name].append(_Run(maker.made(_large(format, name), name)))
        for name in others:
            if format.refused_cache(deep.checkpoint, name, name) is None:
                caches[name] = _Run(maker.with_cache(deep, name), _LONG_PROMPT, repeats=1)
            clock.advance()
        return _measure_runs(format, fixed, by_type, caches, maker.base, progress, seconds)


@contextmanager
def _room() -> Iterator[Path]:
    """Yield a directory that is gone when the block ends.

    Raises:
        OutputError: what the block wrote there found no room.
    """
    with TemporaryDirectory(prefix="acip-export-") as directory:
        try:
            yield Path(directory)
        except OSError as reason:
            if reason.errno not in NO_ROOM:
                raise
            raise OutputError(
                f"{gettempdir()} has no room for the models that are measured, 0.7 GB at a time: {reason.strerror}. "
                "Make room there, or choose another place with  TMPDIR=DIR"
            ) from reason


def _measure_runs(
    format: ExportFormat,
    fixed: Sequence[_Run],
    by_type: Mapping[str, Sequence[_Run]],
    caches: Mapping[str, _Run],
    base: str,
    progress: ProgressCallback,
    seconds: float,
) -> dict[str, RuntimeSpeed]:
    """Run the small models, then those of each type and cache type, in every runtime of a format that is installed."""
    runs = [*fixed, *chain(*by_type.values()), *caches.values()]
    measured: dict[str, RuntimeSpeed] = {}
    for runtime, (version, passes) in _run_all(format, runs, progress, seconds).items():
        shortest = ((min(prompts), min(answers)) for prompts, answers in passes)
        timed = (run.timed(*times) for run, times in zip(runs, shortest, strict=True))
        few, many, wide, narrow, short, long = islice(timed, len(fixed))
        speeds = fit(
            few_layers=few,
            many_layers=many,
            narrow=narrow,
            short_prompt=short,
            long_prompt=long,
            large_vocabulary=wide,
            by_type={name: list(islice(timed, len(made))) for name, made in by_type.items()},
            caches=dict(zip(caches, timed, strict=True)),
            base=base,
            version=version,
        )
        prompt_error, answer_error = (_error([each[which] for each in passes]) for which in (0, 1))
        measured[runtime] = replace(speeds, prompt_error=prompt_error, answer_error=answer_error)
    return measured


def _error(runs: Sequence[Sequence[float]]) -> float:
    """Return how far off predictions may be: what nine of ten runs differ by at most from one pass to another."""
    return max(LEAST_ERROR, float(np.quantile([max(times) / min(times) for times in runs], 0.9)) - 1)


def _run_all(
    format: ExportFormat, runs: Sequence[_Run], progress: ProgressCallback, seconds: float
) -> dict[str, tuple[str, list[tuple[list[float], list[float]]]]]:
    """Return the version of each runtime that is installed, and of each run the shortest times in every pass.

    The times are seconds of a token: of the prompt, and of the answer.

    Raises:
        MissingExtraError: none is.
    """
    every = len(runs) * _PASSES
    clock = Clock(f"speed of {format.name}", every, progress)
    installed, versions = list(format.sessions), dict[str, str]()
    times: dict[str, list[tuple[list[float], list[float]]]] = {
        session.runtime: [([], []) for _ in runs] for session in installed
    }
    for _ in range(_PASSES):
        for index, run in enumerate(runs):
            with run.made.there():
                for session in tuple(installed):
                    try:
                        with session.open(run.made.path, run.made.serving) as opened:
                            versions[session.runtime] = opened.name
                            share = seconds / every / len(format.sessions)
                            prompt, answer = shortest_times(opened, run.tokens, share, run.repeats)
                    except MissingExtraError:
                        installed.remove(session)
                        if not installed:
                            raise
                    else:
                        prompts, answers = times[session.runtime][index]
                        prompts.append(prompt)
                        answers.append(answer)
            clock.advance()
    return {session.runtime: (versions[session.runtime], times[session.runtime]) for session in installed}


class _Maker:
    """Makes exports of random numbers of one format."""

    def __init__(self, place: Path, format: ExportFormat) -> None:
        self._place, self._format = place, format
        self.base = embedded(format)
        self._checkpoints: dict[Sizes, Checkpoint] = {}
        self._count = 0

    def made(self, sizes: Sizes, type_name: str | None = None) -> _Made:
        """Return one whose layers have a type, not written; ``None``: the type that the embedding has, too."""
        format = self._format
        if sizes not in self._checkpoints:
            self._checkpoints[sizes] = made_checkpoint(self._place / f"model-{len(self._checkpoints)}", sizes)
        serving = Serving(_LONG_PROMPT + _NEW, next(iter(format.cache_types)), _BATCH, DEFAULT_BACKEND)
        decisions = uniform(format, tensor_shapes(sizes), type_name or self.base)
        return _Made(format, self._checkpoints[sizes], decisions, serving, self._path())

    def written(self, sizes: Sizes, type_name: str | None = None) -> _Made:
        """Write one that stays.

        Raises:
            UnsupportedError: matrices cannot be of this type.
        """
        made = self.made(sizes, type_name)
        made.write()
        return made

    def with_cache(self, made: _Made, cache_type: str) -> _Made:
        """Return a made model with another type of KV cache; where files have no such type, it is the same one."""
        serving = replace(made.serving, cache_type_k=cache_type, cache_type_v=cache_type)
        if not self._format.cache_in_file:
            return replace(made, serving=serving)
        other = replace(made, serving=serving, path=self._path())
        other.write()
        return other

    def _path(self) -> Path:
        self._count += 1
        return self._place / f"export-{self._count}"


def _large(format: ExportFormat, type_name: str) -> Sizes:
    """Return the large model whose layers have a type."""
    shapes = tensor_shapes(replace(_LARGE, layers=1)).values()
    layer = sum(format.type(type_name).nbytes(*shape) for shape in shapes if len(shape) == 2)
    return replace(_LARGE, layers=min(_MOST_LAYERS, max(_LARGE.layers, ceil_div(_LARGE_BYTES, layer))))


def uniform(format: ExportFormat, shapes: Mapping[str, tuple[int, ...]], type_name: str) -> tuple[TensorDecision, ...]:
    """Return the decisions for a model whose matrices all have one type, or what embeddings have instead of it."""

    def decision(name: str, shape: tuple[int, ...]) -> TensorDecision:
        chosen = type_name
        if len(shape) == 1:
            chosen = format.vector_type
        elif is_embedding(name) and type_name not in format.embedding_types:
            chosen = embedded(format)
        nbytes = format.type(chosen).nbytes(shape[0] if len(shape) == 2 else 1, shape[-1])
        return TensorDecision(name, shape, "dense", nbytes, chosen)

    return tuple(decision(name, shape) for name, shape in shapes.items())


def embedded(format: ExportFormat) -> str:
    """Return the most precise quantized type of embeddings, which every matrix fits."""
    return next(name for name in format.embedding_types if not format.type(name).is_float)


def shortest_times(opened: Any, tokens: int, seconds: float, repeats: int = _REPEATS) -> tuple[float, float]:
    """Return the shortest times of a token of a prompt of ``tokens`` and of the answer: other programs only lengthen
    them. It is read ``repeats`` times, and more often while ``seconds`` have not passed."""
    _seconds(opened, min(tokens, _WARM_UP))  # what is read and allocated once
    end = time.perf_counter() + seconds
    times: list[tuple[float, float]] = []
    while len(times) < repeats or time.perf_counter() < end:
        times.append(_seconds(opened, tokens))
    return min(prompt for prompt, _ in times), min(answer for _, answer in times)


@dataclass(frozen=True)
class _Run:
    """A prompt and the beginning of an answer."""

    made: _Made
    tokens: int = _PROMPT
    repeats: int = _REPEATS

    def timed(self, prompt: float, answer: float) -> Timed:
        """Return what was computed in these times."""
        made = self.made
        shape, serving = made.checkpoint.shape, made.serving
        matrices = [each for d in made.decisions for each in products(d, made.format.name, shape)]
        return Timed(
            prompt=prompt,
            answer=answer,
            tokens=self.tokens,
            batch=min(_BATCH, self.tokens),
            nbytes=sum(matrix.nbytes for matrix in matrices),
            weights=sum(matrix.weights for matrix in matrices if not matrix.head),
            head=sum(matrix.weights for matrix in matrices if matrix.head),
            layers=shape.layers,
            hidden=shape.hidden,
            cache=made.format.memory.serving(shape, serving).kv_cache / serving.context,
        )


def _seconds(opened: Any, prompt: int) -> tuple[float, float]:
    """Return the seconds of a token of a prompt, and of the answer after it."""
    speed: Speed = opened.speed([1 + index % 200 for index in range(prompt)], _NEW)
    assert speed.decode is not None
    return 1 / speed.prefill, 1 / speed.decode


def tensor_shapes(sizes: Sizes) -> Mapping[str, tuple[int, ...]]:
    """Return names and shapes of a Llama."""
    hidden, ffn = sizes.hidden, sizes.ffn
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocabulary, hidden)}
    for layer in range(sizes.layers):
        name = f"model.layers.{layer}"
        tensors |= {f"{name}.self_attn.{each}_proj.weight": (hidden, hidden) for each in "qkvo"}
        tensors |= {f"{name}.mlp.{each}_proj.weight": (ffn, hidden) for each in ("gate", "up")}
        tensors[f"{name}.mlp.down_proj.weight"] = (hidden, ffn)
        tensors |= {f"{name}.{each}_layernorm.weight": (hidden,) for each in ("input", "post_attention")}
    return {**tensors, "model.norm.weight": (hidden,)}


def made_checkpoint(place: Path, sizes: Sizes) -> Checkpoint:
    """Write configuration and tokenizer of a Llama that has no weights; its tokens are bytes."""
    place.mkdir()
    heads = sizes.hidden // _HEAD_SIZE
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _HEAD_SIZE,
        "vocab_size": sizes.vocabulary,
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
    _tokenizer(place)
    return Checkpoint(place, config, {})


def _tokenizer(place: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's, which every runtime knows
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(place)
