"""Triangular matrices that are worked with in their place, over several of the blocks that this takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from acip_export.lowrank.triangular import above_diagonal, add_one_, invert_upper_

SIZE = 1100


def upper_of(size: int, diagonal: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    return entries.triu(1) + diagonal * torch.diag(torch.linspace(1, 2, size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 100, SIZE])
def test_an_inverse(size: int) -> None:
    upper = upper_of(size, 1.0)
    found = invert_upper_(upper.clone())
    torch.testing.assert_close(found @ upper, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-8)
    assert not found.tril(-1).any()


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("size", [1, 512, SIZE])
def test_one_is_added_to_the_matrix_whose_inverse_it_is_the_root_of(size: int, dtype: torch.dtype, off: float) -> None:
    upper = upper_of(size, 2.0)
    matrix = torch.linalg.inv(upper.T @ upper)
    expected = torch.linalg.inv(matrix + torch.eye(size, dtype=torch.float64))
    given = upper.to(dtype)
    found = add_one_(given)
    assert found is given and not found.tril(-1).any() and bool((found.diagonal() > 0).all())
    torch.testing.assert_close((found.T @ found).double(), expected, rtol=0, atol=off * float(expected.max()))


def test_above_the_diagonal() -> None:
    assert above_diagonal(3).tolist() == [[False, True, True], [False, False, True], [False, False, False]]
