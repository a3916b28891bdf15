from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acip_export.errors import UsageError
from acip_export.units import ceil_div, format_bytes, format_seconds, parse_bytes, size_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4 * 10**9),
        ("4GiB", 4 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("0.1GB", 10**8),
        ("900mb", 900 * 10**6),
        ("123456B", 123456),
        (" 2 kB ", 2000),
        ("4G", 4 * 10**9),
        ("200m", 200 * 10**6),
        ("1.5Gi", 3 * 2**29),
        ("2K", 2000),
    ],
)
def test_parse(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4", "write for example 4MB"),
        ("0", "write for example 900MB"),
        ("4000000000", "no unit"),
        ("-4GB", "more than zero"),
        ("0MB", "more than zero"),
        ("4 parsecs", "unknown unit"),
        ("", "not a quantity"),
        ("GB", "not a quantity"),
        ("4GB5", "not a quantity"),
        ("nan GB", "not a quantity"),
        ("1e9GB", "not a quantity"),
        ("BB", "not a quantity"),
        ("4IB", "unknown unit"),
        ("4KBB", "unknown unit"),
        ("50%", "not a quantity"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "expected"), [("50%", 1_000_000), ("12.5 %", 250_000), ("150%", 3_000_000)])
def test_a_share_of_a_whole(text: str, expected: int) -> None:
    assert parse_bytes(text, whole=lambda: 2_000_000) == expected


def test_no_share_is_nothing_or_negative() -> None:
    for text in ("0%", "-5%"):
        with pytest.raises(UsageError, match="more than zero"):
            parse_bytes(text, whole=lambda: 2_000_000)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(150 * 10**6, "150MB"), (15 * 10**8, "1.5GB"), (4 * 10**9, "4GB"), (174_655_360, "175MB"), (999, "999B")],
)
def test_sizes_in_names(count: int, expected: str) -> None:
    assert size_name(count) == expected


@given(st.integers(1, 10**15))
def test_bytes_round_trip(count: int) -> None:
    assert parse_bytes(f"{count}B") == count
    # Three significant digits are shown.
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=6e-3)


@given(st.integers(0, 2**70), st.integers(1, 2**40))
def test_ceil_div_is_the_least_number_of_blocks_that_holds_all(count: int, size: int) -> None:
    blocks = ceil_div(count, size)
    assert blocks * size >= count > (blocks - 1) * size


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5_369, "89 min"), (5_400, "1 h 30 min"), (86_400, "24 h 0 min")],
)
def test_seconds_as_people_say_them(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected


@pytest.mark.parametrize("text", ["9" * 5000, "1" + "0" * 400, "1" * 30 + "GB", "9" * 5000 + "GB", "1e400GB"])
def test_more_than_there_is(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_bytes(text)
    assert len(str(refused.value)) < 200
