"""Every parser of ours on damaged files, always the same; ``make fuzz`` takes others, for as long as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_seeds import write_seeds
from tools.fuzz import fuzz, outcome, readers

ENDINGS = tuple(readers())


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeds(tmp_path_factory.mktemp("seeds"))


def test_there_is_a_seed_of_every_kind(seeds: Path) -> None:
    for ending, read in readers().items():
        (file,) = seeds.glob(f"*{ending}")
        assert outcome(read, file) == "read"


def test_a_finding_is_one(tmp_path: Path) -> None:
    def broken(_: Path) -> object:
        return {}["missing"]

    assert outcome(broken, tmp_path).startswith("BUG: KeyError")


@pytest.mark.parametrize("ending", ENDINGS)
def test_damage_is_a_sentence(ending: str, seeds: Path, tmp_path: Path) -> None:
    (seed,) = seeds.glob(f"*{ending}")
    whole, read = seed.read_bytes(), readers()[ending]
    file = tmp_path / f"x{ending}"

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def harm(data: st.DataObject) -> None:
        begin = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(begin, min(len(whole), begin + 40)))
        file.write_bytes(whole[:begin] + data.draw(st.binary(max_size=12)) + whole[end:])
        assert not outcome(read, file).startswith("BUG")

    harm()


def test_the_loop(seeds: Path, tmp_path: Path) -> None:
    assert fuzz(seeds, tmp_path / "corpus", seed=0, files=1000) == []
    assert len(list((tmp_path / "corpus").iterdir())) > 10, "what is new is kept"
