"""Variants that go through a model block by block lose what whole models of them lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from acip_export.errors import UnsupportedError
from acip_export.io import kept_states
from acip_export.materialization.rounded_weights import RoundedRows
from acip_export.measurement import block_passes
from acip_export.measurement.block_passes import BlockPasses, in_int8
from acip_export.model import block_model
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import load_causal_lm
from tests.support import make_model

WINDOWS = torch.randint(512, (3, 24), generator=torch.Generator().manual_seed(1))
ARCHITECTURES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": False},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64},
}


class Changed:
    """Some tensors with noise, and some products that read int8."""

    def __init__(self, checkpoint: Checkpoint, ends: Sequence[str], in_int8: Mapping[str, int] | None = None) -> None:
        self.blocks = in_int8 or {}
        noise = torch.Generator().manual_seed(0)
        self.all = {
            name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=noise)
            for name in checkpoint.tensors
            if name.endswith(tuple(ends))
            for tensor in [checkpoint.read(name).float()]
        }

    def tensors(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        return {name: self.all[name] for name in names if name in self.all}

    def rows(self, name: str) -> RoundedRows | None:
        return RoundedRows((id(self), name), self.all[name].__getitem__) if name in self.all else None

    def input_blocks(self, names: Sequence[str]) -> Mapping[str, int]:
        return {name: self.blocks[name] for name in names if name in self.blocks}


def passes(checkpoint: Checkpoint) -> BlockPasses:
    return BlockPasses(checkpoint, WINDOWS)


@pytest.mark.parametrize(
    ("arch", "dtype"), [*((arch, torch.float32) for arch in ARCHITECTURES), ("llama", torch.bfloat16)]
)
def test_divergences_are_those_of_whole_models(
    arch: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, whatever the weights are stored in; logits a few tokens at a time, the head in slices."""
    monkeypatch.setattr(block_passes, "_LOGITS", 4096)
    monkeypatch.setattr(block_passes, "_LOG_PROBABILITIES", 1024)
    monkeypatch.setattr(block_model, "_SLICE", 10_000)
    monkeypatch.setattr(block_model, "ROWS_AT_ONCE", 100)
    checkpoint = Checkpoint.open(make_model(tmp_path / "m", arch, dtype, **ARCHITECTURES[arch]))
    embedding = "wte.weight" if arch == "gpt2" else "embed_tokens.weight"
    ends = ((), ("c_fc.weight", "mlp.up_proj.weight"), (embedding,), ("weight",))
    variants = [Changed(checkpoint, each) for each in ends]
    steps = []
    measured = passes(checkpoint).divergences(variants, lambda: steps.append(1))
    assert len(steps) == 2 * (1 + len(variants))
    dense = load_causal_lm(checkpoint, torch.float32)
    with torch.no_grad():
        expected = dense(input_ids=WINDOWS).logits
        for variant, found in zip(variants, measured, strict=True):
            assert len(variant.all) > 0 or variant is variants[0]
            model = load_causal_lm(checkpoint, torch.float32)
            model.load_state_dict(dict(variant.all), strict=False)
            logits = model(input_ids=WINDOWS).logits
            believed, predicted = expected.log_softmax(-1), logits.log_softmax(-1)
            kl = (believed.exp() * (believed - predicted)).sum(-1)
            assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-7)
            assert found.error == pytest.approx(float(kl.std() / kl.numel() ** 0.5), rel=1e-3, abs=1e-7)
            assert found.same_top == pytest.approx(float((logits.argmax(-1) == expected.argmax(-1)).float().mean()))
            assert found.tokens == WINDOWS.numel()
    assert measured[0].kl == 0 and min(each.kl for each in measured[1:]) > 1e-5


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_products_read_int8(arch: str, tmp_path: Path) -> None:
    """In blocks, of the named matrices alone; a head that shares the embedding goes by its name."""
    checkpoint = Checkpoint.open(make_model(tmp_path / "m", arch, **ARCHITECTURES[arch]))
    embedding, layer = (
        ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight")
        if arch == "gpt2"
        else ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight")
    )
    dense = load_causal_lm(checkpoint, torch.float32)
    head = "lm_head" if arch == "gpt2" or checkpoint.shape.tied_embeddings else None
    assert head is not None
    through = passes(checkpoint)
    variants = [Changed(checkpoint, (), {name: 48}) for name in (embedding, layer)]
    for variant, name in zip(variants, (head, layer.removesuffix(".weight")), strict=True):
        (found,) = through.divergences([variant])

        def round_rows(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            rows = args[0].clone()
            for begin in range(0, rows.shape[-1], 48):
                part = rows[..., begin : begin + 48]
                step = part.abs().amax(-1, keepdim=True) / 127
                rows[..., begin : begin + 48] = (part / step).round() * step
            return (rows,)

        with torch.no_grad():
            expected = dense(input_ids=WINDOWS).logits.log_softmax(-1)
            handle = dense.get_submodule(name).register_forward_pre_hook(round_rows)
            logits = dense(input_ids=WINDOWS).logits.log_softmax(-1)
            handle.remove()
        kl = float((expected.exp() * (expected - logits)).sum(-1).mean())
        assert found.kl == pytest.approx(kl, rel=1e-2, abs=3e-8)  # what float32 leaves of a mean of log-softmaxes
        assert kl > 3e-7


def test_a_row_of_zeros_stays() -> None:
    assert torch.equal(in_int8(torch.zeros(2, 3), 32), torch.zeros(2, 3))


def test_the_model_is_left_without_weights(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_model(tmp_path / "m"))
    through = passes(checkpoint)
    through.divergences([Changed(checkpoint, ("weight",)), Changed(checkpoint, (), {"model.embed_tokens.weight": 32})])
    assert {parameter.device.type for parameter in through.model.model.parameters()} == {"meta"}
    assert not any(module._forward_pre_hooks for module in through.model.model.modules())


def test_blocks_that_are_no_chain_are_refused(tmp_path: Path) -> None:
    through = passes(Checkpoint.open(make_model(tmp_path / "m")))
    through.model.modules.reverse()
    with pytest.raises(UnsupportedError, match="no chain cannot be measured block by block"):
        through.divergences([])


@pytest.mark.usefixtures("kept_at_once")
def test_passes_go_on_where_they_were(tmp_path: Path) -> None:
    """To the same figures, from the same variants alone, and not from a damaged file."""
    checkpoint = Checkpoint.open(make_model(tmp_path / "m", num_hidden_layers=3))
    through = passes(checkpoint)
    variants = [Changed(checkpoint, each) for each in ((), ("layers.1.mlp.up_proj.weight",), ("embed_tokens.weight",))]
    file = tmp_path / "states.run"
    whole, steps = through.divergences(variants), list[int]()

    def stop() -> None:
        steps.append(1)
        if len(steps) == 10:  # the third block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), kept_states.kept_states(file, "a") as kept:
        through.divergences(variants, stop, kept)
    for origin, damage, behind in (("a", None, 2), ("b", None, 0), ("a", -1, 0), ("a", -100_000, 0)):
        left = file.read_bytes()
        if damage is not None:
            changed = bytearray(left)
            changed[damage] ^= 1
            file.write_bytes(changed)
        steps.clear()
        with kept_states.kept_states(file, origin) as kept:
            assert kept.blocks == behind
            assert through.divergences(variants, lambda: steps.append(1), kept) == whole
        assert len(steps) == (3 - behind) * 4 and not list(tmp_path.glob("*.run*"))
        file.write_bytes(left)


def test_a_place_without_room_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept_states, "_AT_MOST_LOST", 0.0)
    (tmp_path / "a file").touch()
    with kept_states.kept_states(tmp_path / "a file" / "b.run", "a") as kept:
        kept.passed(1, {"0": torch.zeros(2)})
        kept.passed(2, {"0": torch.zeros(2)})
    assert caplog.text.count("is not kept") == 1
