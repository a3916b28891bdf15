"""Gains of tuning multiply what ggml reads of a block, in every type that has a scale for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from acip_export.rounding.quantizer import InputMoments
from acip_export.weight_types import weight_type
from converters.gguf.block_codes import SCALE_PLACES
from converters.gguf.rounding import round_trip
from converters.gguf.types import TUNABLE_TYPES

# float16 has eleven bits.
HALF = 2.0**-11


def test_the_table_has_the_types_that_say_so() -> None:
    assert SCALE_PLACES.keys() == TUNABLE_TYPES


# ggml's tables for it take half a minute on a busy machine.
SLOW = {"iq1_s"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in sorted(TUNABLE_TYPES)],
)
def test_ggml_reads_the_product(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 512, generator=random)
    importance = torch.rand(512, generator=random) + 0.1
    block = weight_type("gguf", name).block
    gains = (1 + 0.1 * torch.randn(6, 512 // block, generator=random)).half()
    plain = round_trip(weight, name, InputMoments(importance))
    tuned = round_trip(weight, name, InputMoments(importance, gains=gains))
    expected = plain * gains.float().repeat_interleave(block, dim=1)
    # A scale, and that of the minima, are rounded once each.
    largest = plain.abs().view(6, -1, block).amax(-1).repeat_interleave(block, dim=1)
    assert bool(((tuned - expected).abs() <= 2 * HALF * 2 * largest).all())
    assert not np.array_equal(tuned.numpy(), plain.numpy())
    rows = torch.tensor([3, 1])
    some = round_trip(weight[rows], name, InputMoments(importance, gains=gains).of_rows(rows))
    torch.testing.assert_close(some, tuned[rows], rtol=0, atol=0)
