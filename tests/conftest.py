"""Settings for every test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny matrices gain nothing from threads, and on a busy machine waiting for each other costs minutes."""
    torch.set_num_threads(1)
