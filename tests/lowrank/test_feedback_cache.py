"""Factors of error feedback on disk: found again by all that they follow from, whole or not at all, and bounded."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from acip_export.lowrank import feedback_cache
from acip_export.lowrank.feedback_cache import FeedbackCache
from acip_export.lowrank.moments import PackedMoment, pack_moment
from acip_export.rounding.error_feedback import FeedbackFactor

SIZE = 48
AN_HOUR_AGO = 3601.0


def packed(seed: int = 0, size: int = SIZE) -> PackedMoment:
    samples = torch.randn(200, size, generator=torch.Generator().manual_seed(seed)).double()
    return pack_moment(samples.T @ samples / 200)


def other(seed: int) -> FeedbackFactor:
    """A valid factor that no moment here has."""
    numbers = np.random.default_rng(seed)
    return FeedbackFactor(
        numbers.permutation(SIZE).astype(np.int32),
        numbers.integers(-127, 128, SIZE * (SIZE - 1) // 2).astype(np.int8),
        numbers.random(SIZE).astype(np.float32),
    )


def same(one: FeedbackFactor | None, two: FeedbackFactor) -> bool:
    return one is not None and all(
        getattr(one, part).dtype == getattr(two, part).dtype and np.array_equal(getattr(one, part), getattr(two, part))
        for part in ("order", "codes", "steps")
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeedbackCache:
    """For inputs as narrow as these, however full the disk is."""
    monkeypatch.setattr(feedback_cache, "LEAST_COLUMNS", SIZE)
    monkeypatch.setattr(feedback_cache, "_LEFT_FREE", 0)
    return FeedbackCache(tmp_path / "home" / "feedback")


def entry(cache: FeedbackCache) -> Path:
    (found,) = cache.directory.iterdir()
    return found


def kept(cache: FeedbackCache, moment: PackedMoment) -> FeedbackFactor | None:
    return cache.read(moment.digest, moment.size)


def age(file: Path, seconds: float = AN_HOUR_AGO) -> None:
    os.utime(file, times=(time.time() - seconds,) * 2)


def test_a_factor_is_made_once(cache: FeedbackCache, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = packed().scaled(np.linspace(1, 2, SIZE, dtype=np.float32))
    made = cache.factor(moment, "it")
    assert same(made, moment.feedback_factor())
    with monkeypatch.context() as unmade:
        unmade.setattr(PackedMoment, "feedback_factor", lambda *_: pytest.fail("made again"))
        found = FeedbackCache(cache.directory).factor(moment, "it")
    assert same(found, made)
    assert found.order.flags.writeable and found.steps.flags.writeable  # torch warns of arrays that are not
    # What is read is what lies there.
    assert cache.write(moment.digest, other(1)) and same(cache.factor(moment, "it"), other(1))


def test_narrow_inputs_are_not_kept(cache: FeedbackCache, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = packed(size=SIZE - 1)
    assert not cache.write(narrow.digest, narrow.feedback_factor()) and not cache.directory.exists()
    with monkeypatch.context() as patch:
        patch.setattr(feedback_cache, "LEAST_COLUMNS", SIZE - 1)
        assert cache.write(narrow.digest, narrow.feedback_factor())
    assert kept(cache, narrow) is None  # nor looked for


def test_a_factor_is_found_by_all_that_it_follows_from(cache: FeedbackCache, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = packed()
    scaled = replace(moment, scales=np.full(SIZE, 2, np.float32))  # with the diagonal of before
    assert (
        cache.write(moment.digest, other(0))
        and cache.write(scaled.digest, other(1))
        and cache.write(packed(1).digest, other(2))
    )
    assert same(kept(cache, moment), other(0)) and same(kept(cache, scaled), other(1))
    assert kept(cache, replace(moment, scales=np.full(SIZE, 3, np.float32))) is None
    assert kept(cache, replace(moment, steps=2 * moment.steps)) is None
    assert kept(cache, replace(moment, tokens=8192)) is None
    for name in ("_VERSION", "FEEDBACK_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(feedback_cache, name, "another")
            assert kept(cache, moment) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "another")
        assert kept(cache, moment) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        assert kept(cache, moment) is None
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert kept(cache, moment) is None
    finally:
        torch.set_num_threads(threads)


def damaged(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def of_another_size(file: Path) -> None:
    content = bytes(file.stat().st_size)
    file.write_bytes(hashlib.sha256(content).digest() + content)


def far_too_large(file: Path) -> None:
    os.truncate(file, 1 << 42)  # a hole, more than any memory


def empty(file: Path) -> None:
    file.write_bytes(b"")


def no_file(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def unreadable(file: Path) -> None:
    file.unlink()
    file.symlink_to("/nowhere/at/all")


@pytest.mark.parametrize("harm", [damaged, truncated, of_another_size, far_too_large, empty, no_file, unreadable])
def test_entries_that_are_none_are_made_again(harm: Callable[[Path], None], cache: FeedbackCache) -> None:
    moment = packed()
    made = cache.factor(moment, "it")
    whole = entry(cache).read_bytes()
    harm(entry(cache))
    assert kept(cache, moment) is None
    assert same(cache.factor(moment, "it"), made)
    assert entry(cache).read_bytes() == whole


def test_the_least_recently_used_entries_go(cache: FeedbackCache, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [packed(seed) for seed in range(5)]
    files = []
    for number, moment in enumerate(moments[:3]):
        before = set(cache.directory.iterdir()) if number else set()
        assert cache.write(moment.digest, other(number))
        (new,) = set(cache.directory.iterdir()) - before
        files.append(new)
        age(new, AN_HOUR_AGO * (3 - number))
    size = files[0].stat().st_size
    monkeypatch.setattr(feedback_cache, "MOST_BYTES", 3 * size)
    strange = [cache.directory / name for name in ("notes.txt", f"{'0a' * 32}.safetensors", f"{'0A' * 32}.factor")]
    for file in strange:
        file.write_bytes(bytes(10 * size))  # foreign: not counted, not removed
        age(file, 10 * AN_HOUR_AGO)
    # Reading the oldest is using it.
    assert kept(cache, moments[0]) is not None
    assert cache.write(moments[3].digest, other(3))
    assert [kept(cache, moment) is not None for moment in moments[:4]] == [True, False, True, True]
    # Nothing that is in use goes: who reads more than there is room for would find the first ones gone.
    assert not cache.write(moments[4].digest, other(4)) and kept(cache, moments[4]) is None
    assert all(kept(cache, moments[number]) is not None for number in (0, 2, 3))
    assert all(file.exists() for file in strange)


def test_more_than_there_is_room_for_removes_nothing_else(
    cache: FeedbackCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.write(packed().digest, other(0))
    old = entry(cache)
    age(old)
    free = shutil.disk_usage(cache.directory).free
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(feedback_cache, "_LEFT_FREE", free - old.stat().st_size + 1)
    monkeypatch.setattr(feedback_cache, "MOST_BYTES", 0)
    assert not cache.write(packed(1).digest, other(1)) and old.exists()
    monkeypatch.setattr(feedback_cache, "MOST_BYTES", 10**9)
    monkeypatch.setattr(feedback_cache, "_LEFT_FREE", free - old.stat().st_size)
    assert cache.write(packed(1).digest, other(1)) and old.exists()


def test_what_killed_processes_left_goes(cache: FeedbackCache) -> None:
    cache.directory.mkdir(parents=True)
    left, written = (cache.directory / f".{'0a' * 32}.factor.{8 * digit}.tmp" for digit in "ab")
    for place in (left, written, cache.directory / ".mine.tmp"):
        place.mkdir()
        (place / "new").touch()
    for place in (left, cache.directory / ".mine.tmp"):
        age(place)
    assert cache.write(packed().digest, other(0))
    assert not left.exists()
    assert written.exists() and (cache.directory / ".mine.tmp").exists()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("place", ["a file", "/proc/nowhere"])
def test_a_place_that_cannot_be_written_to_is_no_error(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    moment, nowhere = packed(), FeedbackCache(tmp_path / place / "feedback")
    assert same(nowhere.factor(moment, "it"), moment.feedback_factor())
    assert not nowhere.write(moment.digest, other(0)) and kept(nowhere, moment) is None
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_threads_share_it(cache: FeedbackCache) -> None:
    moments, found, ready = [packed(seed) for seed in range(3)], list[bool](), threading.Barrier(4)

    def work(number: int) -> None:
        ready.wait()
        for turn in range(20):
            for seed, moment in enumerate(moments):
                if (turn + number) % 2:
                    found.append(cache.write(moment.digest, other(seed)))
                else:
                    read = kept(cache, moment)
                    found.append(read is None or same(read, other(seed)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * 20 * 3 and all(found)
    assert len(list(cache.directory.iterdir())) == 3
