"""Factors: through the Gram matrix where it is accurate, side by side, and kept on disk."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from acip_export.errors import UsageError
from acip_export.lowrank import components as factorize
from acip_export.lowrank.cache import FactorCache
from acip_export.lowrank.components import GRAM_RANGE, thin_svd
from acip_export.lowrank.moments import PackedMoment
from acip_export.lowrank.whitening import DAMPING, Whitening, triangular_root
from acip_export.materialization.factors import basis_moments, factor_pair
from acip_export.model.checkpoint import Checkpoint
from acip_export.ranking import rank_model
from acip_export.ranking import side_by_side as side_by_side_module
from acip_export.ranking.side_by_side import at_once, side_by_side
from tests.ranking.support import CALIBRATION
from tests.support import interruption_heard


def spectrum(rows: int, columns: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(rows, columns, generator=generator).double(), full_matrices=False)
    return (u * torch.logspace(0, -np.log10(spread), len(vt), dtype=torch.float64)) @ vt


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("spread", [10.0, 0.9 * GRAM_RANGE, 1e9])
def test_gram_and_svd_agree(shape: tuple[int, int], spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = spectrum(*shape, spread)
    expected = torch.linalg.svdvals(matrix)
    calls = []
    whole = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or whole(*a, **k))
    u, s, vt = thin_svd(matrix)
    assert bool(calls) == (spread > GRAM_RANGE)  # a spectrum too wide for the Gram matrix takes the slow way
    assert (s[:-1] >= s[1:]).all()
    # Half a unit of float32 at the end of the range, as the docstring says; exact products.
    torch.testing.assert_close(s, expected, rtol=6e-8, atol=0)
    torch.testing.assert_close((u * s) @ vt, matrix, rtol=0, atol=1e-14)
    for side in (u.T @ u, vt @ vt.T):
        torch.testing.assert_close(side, torch.eye(24, dtype=torch.float64), rtol=0, atol=2e-7)


def test_components_are_those_of_the_symmetric_roots() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(20, 12, generator=generator).double()
    moments = [x.T @ x / 99 for x in (torch.randn(99, n, generator=generator).double() for n in (12, 20))]
    made = factorize.components(weight, *moments)
    (root, inverse), (left, left_inverse) = (_symmetric_roots(moment) for moment in moments)
    u, s, vt = torch.linalg.svd(left @ weight @ root, full_matrices=False)
    torch.testing.assert_close(made.singular, s, rtol=1e-12, atol=0)
    up, down = left_inverse @ u, vt @ inverse
    for k in range(12):  # singular vectors have no sign of their own
        torch.testing.assert_close(
            torch.outer(made.up[:, k], made.down[k]), s[k] * torch.outer(up[:, k], down[k]), rtol=0, atol=1e-11
        )


def _symmetric_roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    damping = DAMPING * moment.diagonal().mean()
    values, vectors = torch.linalg.eigh(moment + damping * torch.eye(len(moment), dtype=torch.float64))
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def test_moment_that_rounding_left_indefinite_has_a_root() -> None:
    moment = torch.diag(torch.tensor([1.0, 1e-2, -1e-3, -1e-3], dtype=torch.float64))
    lower = triangular_root(moment)
    torch.testing.assert_close(lower, lower.tril())
    damped = moment.diagonal() + DAMPING * moment.diagonal().mean()
    torch.testing.assert_close((lower @ lower.T).diagonal(), damped.clamp_min(0), rtol=0, atol=1e-12)


def test_second_ranking_and_every_size_come_from_the_cache(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    files = [tmp_path / name for name in ("plain.acip", "filling.acip", "cached.acip")]
    rank_model(model, text, algorithm="kfac", calibration=CALIBRATION, out=files[0])
    rank_model(model, text, algorithm="kfac", calibration=CALIBRATION, out=files[1], cache=cache)
    count = len(Checkpoint.open(model).linear_modules)
    assert len(list(cache.iterdir())) == count

    def forbidden(*_: object) -> None:
        raise AssertionError("factorized although it was cached")

    monkeypatch.setattr(factorize, "thin_svd", forbidden)
    monkeypatch.setattr(PackedMoment, "root", forbidden)
    cached = rank_model(model, text, algorithm="kfac", calibration=CALIBRATION, out=files[2], cache=cache)
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    # Materializing knows the moments only from the score file; it finds the same entries.
    checkpoint, factors = Checkpoint.open(model), FactorCache(cache)
    for name, module in cached.modules.items():
        weight = checkpoint.read(f"{name}.weight")
        pair = factor_pair(weight, module, basis_moments(cached, module, weight), ((0, 5),), False, factors)
        assert pair.up.shape == (weight.shape[0], 5)
    assert len(list(cache.iterdir())) == count


@pytest.mark.parametrize("harm", ["truncated", "infinite", "other"])
def test_damaged_entries_are_made_again(tmp_path: Path, harm: str) -> None:
    from safetensors.torch import load_file, save_file

    weight, moment = spectrum(12, 20, 10).float(), torch.eye(20).double()
    cache = FactorCache(tmp_path)
    first = cache.components(weight, Whitening.of(moment), None)
    (file,) = tmp_path.iterdir()
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        tensors = load_file(file)
        if harm == "infinite":
            tensors["up"][0, 0] = float("inf")
        else:
            tensors["up"] = tensors["up"][:, :3].contiguous()
        save_file(tensors, file)
    torch.testing.assert_close(cache.components(weight, Whitening.of(moment), None).up, first.up)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_entries_are_of_one_weight_and_basis(tmp_path: Path) -> None:
    cache, weight = FactorCache(tmp_path), spectrum(12, 20, 10).float()
    right, left = Whitening.of(torch.eye(20).double() * 2), Whitening.of(torch.eye(12).double())
    made = [
        cache.components(*what)
        for what in ((weight, None, None), (weight, right, None), (weight, right, left), (2 * weight, None, None))
    ]
    assert len(list(tmp_path.iterdir())) == 4
    assert len({float(components.singular[0]) for components in made}) >= 2
    # The same numbers in another dtype are the same weight.
    cache.components(weight.bfloat16(), None, None)
    cache.components(weight.bfloat16().float(), None, None)
    assert len(list(tmp_path.iterdir())) == 5


def test_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="no place for a cache"):
        FactorCache(tmp_path / "file" / "cache")


def test_large_layers_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory is there for them."""
    monkeypatch.setattr(side_by_side_module, "memory_bytes", lambda: 1000)
    assert [at_once(each, 4) for each in (1, 125, 126, 250, 251, 9999)] == [4, 4, 3, 2, 1, 1]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for each, most in ((1, 4), (126, 3), (200, 2)):
            used = {thread for _, thread in side_by_side(lambda _: threading.get_ident(), "abcdefgh", each)}
            assert 1 <= len(used) <= most and threading.get_ident() not in used
        # Alone, with all threads.
        found = dict(side_by_side(lambda _: (threading.get_ident(), torch.get_num_threads()), "ab", 400))
        assert set(found.values()) == {(threading.get_ident(), 4)}
    finally:
        torch.set_num_threads(threads)


def test_side_by_side_keeps_the_order_and_the_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        names = [f"layer{i}" for i in range(10)]
        assert list(side_by_side(str.upper, names)) == [(name, name.upper()) for name in names]
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError):
            list(side_by_side(lambda _: 1 / 0, names))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_an_interruption_waits_only_for_what_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while two of the layers are worked on and one more waits for its turn."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    begun, interrupted = [], interruption_heard()

    def work(name: str) -> None:
        begun.append(name)
        if name == "second":
            time.sleep(0.3)  # until the fourth waits, too
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if name != "first":
            interrupted.wait(60)
            time.sleep(0.5)  # the one who asked hears of it meanwhile

    with pytest.raises(KeyboardInterrupt):
        list(side_by_side(work, ["first", "second", "third", "fourth", "fifth"]))
    assert sorted(begun) == ["first", "second", "third"]
