"""Arrays in a file without a name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from acip_export.errors import OutputError
from acip_export.io.scratch import Scratch


def test_arrays_come_back_and_nothing_is_left(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    first, second = np.arange(12, dtype=np.float32).reshape(3, 4), np.zeros((0, 2), np.int8)
    scratch.write("first", first)
    scratch.write("second", second)
    scratch.write("first", 2 * first)  # in its place
    scratch.write("second", first[1:])  # longer than before
    np.testing.assert_array_equal(scratch.read("first"), 2 * first)
    np.testing.assert_array_equal(scratch.read("second"), first[1:])
    assert "first" in scratch and "third" not in scratch
    assert not list(tmp_path.iterdir())
    scratch.close()


def test_any_number_of_arrays_is_read_in_the_file_through_one_open_file(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    scratch.write("odd", np.arange(3, dtype=np.int8))
    arrays = {str(number): np.full((3, number), number, np.float32) for number in range(1, 40)}
    for name, array in arrays.items():
        scratch.write(name, array)
    scratch.write("7", arrays["7"] + 1)  # in its place
    before = len(list(Path("/dev/fd").iterdir()))
    mapped = scratch.mapped(arrays)
    assert len(list(Path("/dev/fd").iterdir())) <= before + 1
    np.testing.assert_array_equal(mapped["7"], arrays["7"] + 1)
    np.testing.assert_array_equal(mapped["39"], arrays["39"])
    assert mapped["39"].ctypes.data % 4 == 0


def test_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="no room for a ranking's scratch file"):
        Scratch(tmp_path / "file" / "below")
