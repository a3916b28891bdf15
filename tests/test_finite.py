"""Numbers that are finite, and one that is not."""

from __future__ import annotations

import pytest
import torch

from acip_export.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype, value: float) -> None:
    """At the ends and in the middle: vectorized code treats the rest of a row by itself."""
    whole = torch.linspace(-3, 3, 1037).to(dtype)
    assert is_finite(whole)
    assert is_finite(torch.empty(0, dtype=dtype))
    for place in (0, 511, 1036):
        damaged = whole.clone()
        damaged[place] = value
        assert not is_finite(damaged)
