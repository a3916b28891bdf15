"""The planner's memory formulas against what llama.cpp says it allocated."""

from __future__ import annotations

from pathlib import Path

import pytest

from acip_export.api import convert_bundle
from acip_export.artifacts.plan import Serving
from acip_export.errors import VerificationError
from acip_export.model.checkpoint import Checkpoint
from converters.gguf.format import GGUF
from converters.gguf.memory import CACHE_TYPES
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from tests.support import dense, make_bundle, make_model, make_plan

# llama.cpp logs hundredths of a MiB.
LOGGED = 0.01 * 2**20
ARCHS = ("llama", "qwen3")
SHAPES: dict[str, dict[str, object]] = {
    "wide ffn": {},
    "wide vocabulary": {"vocab_size": 4000},
    "wide attention": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
    },
    "wide hidden": {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 3},
}
# Other graphs: windows with a cache of their own, soft caps, more norms, fused projections.
FAMILIES: dict[str, dict[str, object]] = {
    "gemma2": {"sliding_window": 300},
    "gemma3_text": {"sliding_window": 300, "num_hidden_layers": 8},
    "phi3": {},
    "olmo2": {"tie_word_embeddings": False},
    "granite": {},
}


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        *(pytest.param(arch, settings, id=f"{arch}, {name}") for name, settings in SHAPES.items() for arch in ARCHS),
        *(pytest.param(arch, settings, id=arch) for arch, settings in FAMILIES.items()),
    ],
)
def test_formulas_bound_the_log(arch: str, settings: dict[str, object], tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", arch, max_position_embeddings=4096, **settings)
    bundle = make_bundle(model, make_plan(model, "gguf", "stock", dense(type="f16")), tmp_path / "b")
    convert_bundle(bundle.path, tmp_path / "e", check=False)
    checkpoint = Checkpoint.open(model)
    shape = checkpoint.shape
    for keys, values in (("f16", "f16"), ("q8_0", "q8_0"), ("f32", "f32"), ("q4_0", "f32"), ("bf16", "iq4_nl")):
        if GGUF.refused_cache(checkpoint, keys, values):
            continue
        for context, batch in ((200, 200), (512, 16), (1024, 512), (4096, 128)):
            runtime = Serving(context, keys, batch, cache_type_v=values)
            expected = GGUF.memory.serving(shape, runtime)
            with LlamaCppSession(tmp_path / "e", runtime, every_logit=False) as session:
                found = session.buffers
            assert found is not None
            # Logged per kind and layer group, so rounded more than once.
            assert found.kv_cache == pytest.approx(expected.kv_cache, abs=2 * LOGGED)
            assert found.output <= expected.output + LOGGED
            assert found.compute <= expected.compute + LOGGED
            if keys == values == "f16":
                # An upper bound that still says something: the allocator often does better by a third, never by half.
                assert found.compute >= 0.5 * expected.compute


@pytest.mark.parametrize(("arch", "head_dim"), [("llama", 64), ("qwen3", 32), ("llama", 16)])
def test_every_pair_of_cache_types_takes_what_is_planned_or_is_refused(
    arch: str, head_dim: int, tmp_path: Path
) -> None:
    """By the runtime, where and only where the plan refuses it."""
    model = make_model(tmp_path / "m", arch, hidden_size=4 * head_dim, head_dim=head_dim, num_attention_heads=4)
    bundle = make_bundle(model, make_plan(model, "gguf", "stock", dense(type="f16")), tmp_path / "b")
    convert_bundle(bundle.path, tmp_path / "e", check=False)
    checkpoint = Checkpoint.open(model)
    shape = checkpoint.shape
    refused = 0
    for keys in CACHE_TYPES:
        for values in CACHE_TYPES:
            serving = Serving(256, keys, 32, cache_type_v=values)
            if GGUF.refused_cache(checkpoint, keys, values):
                refused += 1
                with pytest.raises(VerificationError, match="no context of 256 tokens"):
                    LlamaCppSession(tmp_path / "e", serving, every_logit=False)
                continue
            expected = GGUF.memory.serving(shape, serving)
            with LlamaCppSession(tmp_path / "e", serving, every_logit=False) as session:
                found = session.buffers
            assert found is not None
            assert found.kv_cache == pytest.approx(expected.kv_cache, abs=2 * LOGGED), (keys, values)
            assert found.compute <= expected.compute + LOGGED, (keys, values)
    assert refused == (len(CACHE_TYPES) ** 2 - 9 if head_dim % 32 else 0)  # all but the pairs of three floats


def test_values_in_blocks_need_flash_attention(tmp_path: Path) -> None:
    """So that every runtime is opened with it, and every printed command has it."""
    model = make_model(tmp_path / "m", hidden_size=128, head_dim=32, num_attention_heads=4)
    bundle = make_bundle(model, make_plan(model, "gguf", "stock", dense(type="f16")), tmp_path / "b")
    convert_bundle(bundle.path, tmp_path / "e", check=False)
    for name, (_, block) in CACHE_TYPES.items():
        LlamaCppSession(tmp_path / "e", Serving(256, name, 32, cache_type_v="f16"), flash_attention=False).__exit__(
            None, None, None
        )
        serving = Serving(256, "f16", 32, cache_type_v=name)
        if block > 1:
            with pytest.raises(VerificationError, match="no context"):
                LlamaCppSession(tmp_path / "e", serving, flash_attention=False)
        with LlamaCppSession(tmp_path / "e", serving):
            pass
