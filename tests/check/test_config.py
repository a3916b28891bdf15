from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acip_export.check.config import LOCK_FILE, EntryTable, Growth, find_config, load_config
from acip_export.errors import UsageError


def _write(directory: Path, text: str, name: str = "acip-check.toml") -> Path:
    file = directory / name
    file.write_text(text, encoding="utf-8")
    return file


def test_everything_that_can_be_written(tmp_path: Path) -> None:
    file = _write(
        tmp_path,
        """
        [[check]]
        name = "phone"
        path = "export/gguf"
        max_bytes = "900MB"
        max_growth = ["1%", "5MB"]
        min_recovery = "95%"
        max_load_time_ratio = 1.5
        missing = "skip"
        [[check]]
        glob = "models/**/*.gguf"
        max_growth = "0%"
        """,
    )
    phone, rest = load_config(file).entries
    assert (phone.max_bytes, phone.min_recovery, phone.max_load_time_ratio) == (900_000_000, 0.95, 1.5)
    assert phone.max_growth == Growth(Fraction(1, 100), 5_000_000)
    assert (phone.missing, phone.is_glob) == ("skip", False)
    assert (rest.name, rest.is_glob, rest.missing) == ("models/**/*.gguf", True, "fail")
    assert load_config(file).lock == tmp_path / "acip-check.lock.json"


def test_every_key_is_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    assert [key for key in (*EntryTable.__struct_fields__, LOCK_FILE) if f"`{key}`" not in documented] == []


def test_pyproject(tmp_path: Path) -> None:
    one = _write(tmp_path, '[tool.acip-export.check]\npath = "m.gguf"\nmax_bytes = "1MB"\n', "pyproject.toml")
    assert find_config(tmp_path) == one
    assert load_config(one).entries[0].name == "m.gguf"
    _write(tmp_path, '[[tool.acip-export.check]]\npath = "m.gguf"\nmax_bytes = "1MB"\n', "pyproject.toml")
    assert len(load_config(one).entries) == 1
    _write(tmp_path, '[[check]]\npath = "m.gguf"\nmax_bytes = "1MB"\n')
    with pytest.raises(UsageError, match="keep one"):
        find_config(tmp_path)


def test_no_configuration_shows_one(tmp_path: Path) -> None:
    _write(tmp_path, '[project]\nname = "other"\n', "pyproject.toml")
    with pytest.raises(UsageError, match=r"\[\[check\]\]"):
        find_config(tmp_path)


@given(st.integers(0, 10**13), st.integers(1, 10**12), st.fractions(0, 2))
def test_the_limit_that_is_hit_first_counts(baseline: int, absolute: int, relative: Fraction) -> None:
    both = Growth(relative, absolute).allowed(baseline)
    alone = Growth(relative, None).allowed(baseline), Growth(None, absolute).allowed(baseline)
    assert both == min(alone)
    assert alone[0] <= relative * baseline < alone[0] + 1


BAD = {
    "not toml": ("[[check]", "TOML"),
    "empty": ("", "no \\[\\[check\\]\\]"),
    "no list": ('check = "x"', "no \\[\\[check\\]\\]"),
    "empty list": ("check = []", "no \\[\\[check\\]\\]"),
    "other key": ('other = 1\n[[check]]\npath = "a"\nmax_bytes = "1MB"', "unknown field other"),
    "typo": ('[[check]]\npath = "a"\nmax_byte = "1MB"', "unknown field max_byte"),
    "no path": ('[[check]]\nmax_bytes = "1MB"', "one of path, glob and export"),
    "path and glob": ('[[check]]\npath = "a"\nglob = "b"\nmax_bytes = "1MB"', "one of path, glob and export"),
    "export and path": ('[[check]]\npath = "a"\nexport = "b"\nmax_bytes = "1MB"', "one of path, glob and export"),
    "path is a number": ('[[check]]\npath = 1\nmax_bytes = "1MB"', "expected str"),
    "path steers terminals": ('[[check]]\npath = "a\\u001b[2J"\nmax_bytes = "1MB"', "must be printable"),
    "absolute path": ('[[check]]\npath = "/a"\nmax_bytes = "1MB"', "below"),
    "path above": ('[[check]]\nglob = "../*"\nmax_bytes = "1MB"', "below"),
    "slow pattern": ('[[check]]\nglob = "**/**/**/*.gguf"\nmax_bytes = "1MB"', "more than once"),
    "long pattern": (f'[[check]]\nglob = "{"*" * 10_000}"\nmax_bytes = "1MB"', "length <= 1000"),
    "long name": (f'[[check]]\npath = "{"a" * 300}"\nmax_bytes = "1MB"', "more than 255 bytes"),
    "dot": ('[[check]]\nglob = "."\nmax_bytes = "1MB"', "below"),
    "bad pattern": ('[[check]]\nglob = "a**/b"\nmax_bytes = "1MB"', "alone"),
    "no limit": ('[[check]]\npath = "a"', "no limit"),
    "bare number": ('[[check]]\npath = "a"\nmax_bytes = 900', "unit"),
    "bare number as text": ('[[check]]\npath = "a"\nmax_bytes = "900"', "no unit"),
    "negative": ('[[check]]\npath = "a"\nmax_bytes = "-1MB"', "more than zero"),
    "negative growth": ('[[check]]\npath = "a"\nmax_growth = "-1%"', "not a quantity"),
    "two percentages": ('[[check]]\npath = "a"\nmax_growth = ["1%", "2%"]', "one of each"),
    "two amounts": ('[[check]]\npath = "a"\nmax_growth = ["1MB", "2MB"]', "one of each"),
    "no growth": ('[[check]]\npath = "a"\nmax_growth = []', "one of each"),
    "growth is a number": ('[[check]]\npath = "a"\nmax_growth = 0.01', "unit"),
    "recovery above one": ('[[check]]\npath = "a"\nmin_recovery = 1.01', "share"),
    "recovery of zero": ('[[check]]\npath = "a"\nmin_recovery = 0', "share"),
    "recovery is true": ('[[check]]\npath = "a"\nmin_recovery = true', "got bool"),
    "recovery is nan": ('[[check]]\npath = "a"\nmin_recovery = nan', "expected float"),
    "ratio of zero": ('[[check]]\npath = "a"\nmax_load_time_ratio = 0', "expected float > 0.0"),
    "ratio is infinite": ('[[check]]\npath = "a"\nmax_load_time_ratio = inf', "expected float <= "),
    "unknown policy": ('[[check]]\npath = "a"\nmax_bytes = "1MB"\nmissing = "pass"', "invalid enum value 'pass'"),
    "same name": ('[[check]]\npath = "a"\nname = "x"\nmax_bytes = "1MB"\n' * 2, "two entries"),
    "same path": (
        '[[check]]\npath = "a"\nname = "x"\nmax_bytes = "1MB"\n[[check]]\npath = "a"\nname = "y"\nmax_bytes = "2MB"',
        "contradict",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configuration(case: str, tmp_path: Path) -> None:
    text, says = BAD[case]
    with pytest.raises(UsageError, match=says):
        load_config(_write(tmp_path, text))


def test_unreadable_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "acip-check.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        load_config(tmp_path / "acip-check.toml")
