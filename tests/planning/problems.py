"""Planning problems of random shapes without weights, for hypothesis: what a plan depends on, made in milliseconds."""

from __future__ import annotations

import copy
import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from acip_export.artifacts.plan import Plan, TensorDecision
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.artifacts.scores import CurvePoint, ModuleScores, RankedModel, RankedOn, ScoreFile
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import task_of
from acip_export.model.tensor_info import TensorInfo
from acip_export.planning import PlanRequest, Problem, SearchSpace, make_plan, resolve
from tests.support import make_tokenizer

# ``make test-exhaustive`` asks for hundreds of examples and every slow type; ``make test`` for some of both.
EXHAUSTIVE = bool(os.environ.get("ACIP_EXHAUSTIVE"))
ARCHITECTURES = ("llama", "qwen2", "qwen3")
MAX_CONTEXT = 8192
_VOCABULARY = 512  # of the tokenizer; a model's may be larger


def examples(few: int, many: int) -> int:
    return many if EXHAUSTIVE else few


@dataclass(frozen=True)
class Shape:
    """Of a model: everything that bytes depend on."""

    arch: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool

    @property
    def settings(self) -> dict[str, Any]:
        """As configurations name them."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": MAX_CONTEXT,
            "tie_word_embeddings": self.tied,
        }


@st.composite
def shapes(draw: st.DrawFn, most_layers: int = 3, widest: int = 768) -> Shape:
    """Widths are whole blocks of some types and not of others, sometimes of none."""
    widths = st.one_of(
        st.integers(1, widest // 256).map(lambda n: 256 * n),
        st.integers(2, widest // 32).map(lambda n: 32 * n),
        st.integers(16, widest // 4).map(lambda n: 4 * n),
    )
    arch = draw(st.sampled_from(ARCHITECTURES))
    kv_heads = draw(st.integers(1, 4))
    heads, head_dim = kv_heads * draw(st.integers(1, 3)), draw(st.sampled_from((16, 32, 64, 80, 128)))
    hidden = draw(widths)
    if arch == "qwen2":
        hidden = heads * head_dim  # the one whose heads have no size of their own
    elif arch == "llama":
        hidden += -hidden % heads  # transformers asks for it
    return Shape(
        arch=arch,
        layers=draw(st.integers(1, most_layers)),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=draw(widths),
        vocabulary=draw(st.integers(_VOCABULARY, 4 * _VOCABULARY)),
        tied=draw(st.booleans()),
    )


@functools.lru_cache(maxsize=32)
def tokenizer_directory(parent: Path, arch: str) -> Path:
    """A directory that is a model's but for the weights."""
    tokenizer = make_tokenizer("llama-bpe" if arch == "llama" else "qwen2", _VOCABULARY)
    tokenizer.save_pretrained(parent / arch)
    (parent / arch / "weights").touch()  # every tensor lies here, at length 0
    return parent / arch


def weightless(shape: Shape, parent: Path) -> Checkpoint:
    """An opened checkpoint with the tensors that transformers gives this shape, none of which can be read."""
    config = AutoConfig.for_model(
        shape.arch, **shape.settings, architectures=[f"{shape.arch.capitalize()}ForCausalLM"], eos_token_id=1
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {
        name: TensorInfo(tuple(value.shape), "BF16", "weights", 0, 2 * value.numel())
        for name, value in model.state_dict().items()
        if not (shape.tied and name == "lm_head.weight")
    }
    return Checkpoint(tokenizer_directory(parent, shape.arch), config.to_dict(), tensors)


def made_up_scores(checkpoint: Checkpoint, seed: int) -> ScoreFile:
    """Losses that fall off within a layer as trained ones do, differ a thousandfold between layers, and do not agree
    with the learned order everywhere."""
    draw = np.random.default_rng(seed)
    modules = {}
    for name, shape in checkpoint.linear_modules.items():
        count = min(shape)
        loss = 10 ** draw.uniform(-6, -3) * np.geomspace(1, 10 ** draw.uniform(-5, 0), count) * draw.uniform(0.5, 2)
        learned = loss * draw.uniform(0.7, 1.4, count)
        rounding = 10 ** draw.uniform(-1, 1) * loss
        modules[name] = ModuleScores(
            shape=shape,
            scores=learned.astype(np.float32),
            drop_loss=loss.astype(np.float32),
            up_sensitivity=rounding.astype(np.float32),
            down_sensitivity=rounding.astype(np.float32),
            sensitivity=float(rounding.sum()),
            input_moment=np.ones(shape[1], np.float32),
            gradient_moment=np.ones(shape[0], np.float32),
        )
    total = sum(float(module.drop_loss.sum()) for module in modules.values())
    return ScoreFile(
        model=RankedModel(checkpoint.name, checkpoint.fingerprint),
        task=task_of(checkpoint.config),
        algorithm={"name": "magnitude", "basis": "svd", "seed": seed},
        data=RankedOn(source="none", sha256="0" * 64, tokens=0),
        versions={},
        curve=tuple(CurvePoint(r / 10, 3 + total * (1 - r / 10) ** 2) for r in range(10, 1, -1)),
        modules=modules,
        embedding_sensitivity={
            name: float(10 ** draw.uniform(-2, 1))
            for name in checkpoint.tensors
            if name.endswith(("embed_tokens.weight", "lm_head.weight"))
        },
        second_moments={},
    )


def overhead(decisions: tuple[TensorDecision, ...]) -> dict[str, int]:
    """File bytes that, as in the real formats, depend a little on what was decided."""
    around = sum(64 + len(str(d.nbytes)) + (40 if d.rank else 0) for d in decisions)
    return {"model": sum(d.nbytes for d in decisions) + around, "config": 777}


def with_overhead(space: SearchSpace) -> SearchSpace:
    """The search space in a format whose files have :func:`overhead` around their tensors."""
    format = copy.copy(space.format)
    object.__setattr__(format, "predict_files", lambda _checkpoint, _layout, tensors, _serving: overhead(tensors))
    return replace(space, format=format)


def planned(
    checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest, errors: RoundingErrors | None = None
) -> Plan:
    """The plan with :func:`overhead` around its tensors."""
    question = resolve(request, checkpoint)
    problem = Problem.of(checkpoint, scores, with_overhead(question.space), errors)
    return make_plan(problem, question.budget, question.rule)
