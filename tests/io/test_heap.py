"""Blocks that are mapped for themselves while matrices are worked on, and not before or after."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Which way a block of 3 MB is made where the heap has no room for it: mallinfo2 counts the mapped ones.
PROBE = """
import ctypes, threading
from acip_export.io.heap import give_back, large_blocks_apart

class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks u f k".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Counts
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def is_apart():
    give_back()
    before = libc.mallinfo2().hblks
    block = libc.malloc(3 << 20)
    apart = libc.mallinfo2().hblks > before
    libc.free(block)
    return "apart" if apart else "heap"

libc.free(libc.malloc(8 << 20))  # from here on glibc by itself takes blocks up to this size from the heap
said = [is_apart()]
with large_blocks_apart():
    said.append(is_apart())
    with large_blocks_apart():
        pass
    said.append(is_apart())
said.append(is_apart())
print(*said)
"""


def ways(**variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment | variables, capture_output=True, text=True, timeout=60
    )
    if "mallinfo2" in done.stderr:
        pytest.skip("only glibc from 2.33 on counts blocks that are mapped")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="glibc is on Linux")
def test_large_blocks_are_apart_until_the_last_is_done() -> None:
    assert ways() == ["heap", "apart", "apart", "heap"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="glibc is on Linux")
@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_MMAP_THRESHOLD_": "6000000"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=6000000"}],
    ids=["variable", "tunable"],
)
def test_what_users_set_stays(variables: dict[str, str]) -> None:
    assert ways(**variables) == ["heap"] * 4
