"""Steps of long work, kept: what is in the journal is on the disk, whenever the process ends."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import numpy as np
import numpy.typing as npt
import pytest

from acip_export.errors import RankingError
from acip_export.io import kept_until_done
from acip_export.io.atomic import remove_directory
from acip_export.io.kept_work import KeptWork, Work, kept_bytes, work_beside


def numbers(seed: int, count: int = 1000) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def begun(directory: Path, third: bool = True) -> KeptWork:
    """Two steps, of which the second has replaced what the first wrote, and half of a third."""
    work = KeptWork(directory, "this")
    scratch = work.scratch("states")
    scratch.write("kept", numbers(0))
    scratch.write("now", numbers(1))
    work.finish("first", {"keys": ["a", "b"]})
    scratch.write("now", numbers(2))
    work.finish("second", 0.1)
    if third:
        scratch.write("now", numbers(3))
        scratch.write("new", numbers(4))
    return work


def test_only_finished_steps_are_there_again(tmp_path: Path) -> None:
    begun(tmp_path / "work")
    work = KeptWork(tmp_path / "work", "this")
    assert ["first" in work, "second" in work, "third" in work] == [True, True, False]
    assert work.facts("first") == {"keys": ["a", "b"]} and work.facts("second") == 0.1
    scratch = work.scratch("states")
    assert list(scratch) == ["kept", "now"]
    np.testing.assert_array_equal(scratch.read("kept"), numbers(0))
    np.testing.assert_array_equal(scratch.read("now"), numbers(2))


def test_a_line_that_was_cut_is_a_step_that_is_not_done(tmp_path: Path) -> None:
    begun(tmp_path / "work", third=False)
    journal = tmp_path / "work" / "journal"
    os.truncate(journal, journal.stat().st_size - 3)
    work = KeptWork(tmp_path / "work", "this")
    assert "first" in work and "second" not in work
    np.testing.assert_array_equal(work.scratch("states").read("now"), numbers(1))
    work.finish("second")
    assert "second" in KeptWork(tmp_path / "work", "this")


def test_room_of_what_was_replaced_is_used_again(tmp_path: Path) -> None:
    file = tmp_path / "work" / "states"
    for _ in range(3):
        work = KeptWork(tmp_path / "work", "this")
        for step in range(10):
            for name in ("a", "b"):
                work.scratch("states").write(name, numbers(step))
                work.scratch("states").write(name, numbers(step + 1))
            work.finish(f"{step}")
    assert file.stat().st_size <= 2 * 2 * numbers(0).nbytes
    work.drop("states")
    assert not file.exists() and list(KeptWork(tmp_path / "work", "this").scratch("states")) == []


def test_work_of_something_else_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun(tmp_path / "work")
    work = KeptWork(tmp_path / "work", "that")
    assert "first" not in work and list(work.scratch("states")) == []
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'work'} is of another model, text or settings; it begins anew"
    ]


def test_damaged_work_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun(tmp_path / "work")
    file = tmp_path / "work" / "states"
    data = bytearray(file.read_bytes())
    data[17] ^= 1
    file.write_bytes(data)
    assert "first" not in KeptWork(tmp_path / "work", "this")
    assert "is damaged" in caplog.text


@pytest.mark.parametrize(
    "stored",
    [
        {"position": 0, "shape": [1], "dtype": "|O8", "checksum": 0},
        {"position": 0, "shape": [2**62, 2**62], "dtype": "<f4", "checksum": 0},
        {"position": 2**62, "shape": [4], "dtype": "<f4", "checksum": 0},
        {"position": -4, "shape": [4], "dtype": "<f4", "checksum": 0},
    ],
)
def test_journals_of_strangers_are_not_believed(tmp_path: Path, stored: dict[str, object]) -> None:
    begun(tmp_path / "work")
    line = json.dumps({"step": "third", "arrays": {"states": {"array": stored}}}).encode()
    with (tmp_path / "work" / "journal").open("ab") as journal:
        journal.write(b"%08x %b\n" % (zlib.crc32(line), line))
    work = KeptWork(tmp_path / "work", "this")
    assert "third" not in work and "array" not in work.scratch("states")


def test_files_of_other_places_are_not_read(tmp_path: Path) -> None:
    begun(tmp_path / "work")
    line = json.dumps({"step": "third", "arrays": {"../secret": {}}, "dropped": "../other"}).encode()
    (tmp_path / "secret").write_bytes(b"secret")
    with (tmp_path / "work" / "journal").open("ab") as journal:
        journal.write(b"%08x %b\n" % (zlib.crc32(line), line))
    assert "third" not in KeptWork(tmp_path / "work", "this")


def test_it_is_gone_when_it_is_done_or_fails(tmp_path: Path) -> None:
    target = tmp_path / "scores.acip"
    with work_beside(target, "this") as work:
        work.finish("first")
        assert kept_bytes(target)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no"), work_beside(target, "this") as work:
        work.finish("first")
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == [] and kept_bytes(target) == 0


def test_interrupted_it_stays_if_it_was_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "scores.acip"
    for reason in (KeyboardInterrupt, RankingError):
        with pytest.raises(reason), work_beside(target, "this") as work:
            work.finish("first")
            raise reason
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(kept_until_done, "_WORTH_KEEPING", 0.0)
    with pytest.raises(KeyboardInterrupt), work_beside(target, "this") as work:
        work.finish("first")
        raise KeyboardInterrupt
    monkeypatch.undo()
    # What was worth it once stays when a moment's work more is interrupted.
    with pytest.raises(KeyboardInterrupt), work_beside(target, "this") as work:
        assert "first" in work
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == [".scores.acip.rank-state"]


def test_work_without_a_place_keeps_nothing(tmp_path: Path) -> None:
    work = Work()
    work.scratch("states").write("array", numbers(0))
    work.finish("first")
    assert "first" not in work and list(work.scratch("states")) == [] and list(tmp_path.iterdir()) == []
    work.drop("states")


class Peer:
    """One of several threads that stand for processes."""

    def __init__(self, index: int, barrier: Barrier, given: list[int]) -> None:
        self.index, self.count, self.barrier, self.given = index, barrier.parties, barrier, given

    def least(self, number: int) -> int:
        self.given[self.index] = number
        self.barrier.wait(30)
        found = min(self.given)
        self.barrier.wait(30)
        return found


def side_by_side(directory: Path, count: int, do: Callable[[KeptWork, Peer], None]) -> list[KeptWork]:
    """Have several processes ``do`` something with the work that they share."""
    barrier, given = Barrier(count), [0] * count

    def work(index: int) -> KeptWork:
        peer = Peer(index, barrier, given)
        work = KeptWork(directory / str(index), "this", peers=peer)
        with suppress(BrokenBarrierError):
            do(work, peer)
        return work

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@pytest.mark.parametrize("dropped", [False, True])
def test_processes_go_on_behind_the_last_step_that_all_have(tmp_path: Path, dropped: bool) -> None:
    """One writes the line of a step more, and is killed like the other before it knows that that has written it."""

    def two_steps_and_one_of_the_first(work: KeptWork, peer: Peer) -> None:
        for step in (1, 2, 3, 4):
            if step == 3 and peer.index == 1:
                while not peer.barrier.n_waiting:
                    time.sleep(0.001)
                peer.barrier.abort()
                return
            if step == 3 and dropped:
                work.drop("states")
            work.scratch("states").write("now", numbers(10 * peer.index + step))
            work.scratch("states").write(f"{step}", numbers(step))
            work.finish(f"{step}")

    side_by_side(tmp_path, 2, two_steps_and_one_of_the_first)
    lines = [(tmp_path / name / "journal").read_bytes().count(b"\n") for name in "01"]
    assert lines == [4, 3]

    def rest(work: KeptWork, peer: Peer) -> None:
        assert [str(step) in work for step in (1, 2, 3)] == [True, True, False]
        states = work.scratch("states")
        assert list(states) == ["now", "1", "2"]
        np.testing.assert_array_equal(states.read("now"), numbers(10 * peer.index + 2))
        states.write("now", numbers(3))
        work.finish("3")

    side_by_side(tmp_path, 2, rest)
    for work in side_by_side(tmp_path, 2, lambda *_: None):
        assert "3" in work


def test_work_of_so_many_processes_begins_anew_in_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    side_by_side(tmp_path, 2, lambda work, _: work.finish("first"))
    assert "first" not in KeptWork(tmp_path / "0", "this")
    assert "was kept by 2 processes, and now there are 1; it begins anew" in caplog.text


def test_what_one_process_has_lost_all_do_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def two_steps(work: KeptWork, _peer: Peer) -> None:
        work.finish("first")
        work.finish("second")

    side_by_side(tmp_path, 2, two_steps)
    remove_directory(tmp_path / "1")
    for work in side_by_side(tmp_path, 2, lambda *_: None):
        assert "first" not in work
    assert "what another process has kept is gone; it begins anew" in caplog.text


def test_what_is_left_of_more_processes_is_removed(tmp_path: Path) -> None:
    for index in (1, 2):
        (tmp_path / f".scores.acip.rank-state-{index}").mkdir()
    with work_beside(tmp_path / "scores.acip", "this"):
        assert [file.name for file in tmp_path.iterdir()] == [".scores.acip.rank-state"]
