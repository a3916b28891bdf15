"""``acip-export cache``: everything that is kept is listed, and removed where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import Run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user's, in an empty directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path / "home" / "acip-export"


def test_nothing_is_kept_at_first(run: Run) -> None:
    done = run("cache")
    assert done.code == 0
    assert done.out.startswith("0 B kept")
    assert run("cache", "graphs").code == 2


def test_caches_are_listed_and_cleared(home: Path, run: Run) -> None:
    (home / "graphs").mkdir(parents=True)
    (home / "graphs" / "a.onnx").write_bytes(b"x" * 1000)
    (home / "traces").mkdir()
    mine = [Path("model.acip"), Path("notes.json"), Path("factors") / "model.safetensors"]
    kept = [Path("model.acip.rounding-gguf-feedback.json"), Path("factors") / f"{'0a' * 32}.safetensors"]
    losses = ("losses-gguf-feedback.json", "losses-gguf.json.run", "candidates-onnx.json", "kv-cache-gguf.json")
    kept += [Path(f"model.acip.{each}") for each in losses]
    Path("factors").mkdir()
    for file in (*mine, *kept):
        file.write_bytes(b"x" * 100)
    listed = json.loads(run("cache", "--cache", "factors", "--json").out)
    assert {each["name"]: each["bytes"] for each in listed["caches"]} == {
        "graphs": 1000,
        "traces": 0,
        "rounding": 100,
        "losses": 400,
        "factors": 100,
    }
    assert not listed["cleared"]
    assert "graphs" in run("cache").out
    assert run("cache", "graphs", "--clear").code == 0
    assert not (home / "graphs").exists() and kept[0].exists()
    done = run("cache", "--cache", "factors", "--clear")
    assert "\n600 B removed\n" in done.out
    assert not any(file.exists() for file in kept)
    assert all(file.exists() for file in mine)


def test_what_no_command_makes_again_is_removed_by_name_alone(home: Path, run: Run) -> None:
    """The real model of the tests is gigabytes, and nobody who clears a cache thinks of it."""
    for name in ("feedback", "graphs", "real", "llama-cpp", "traces"):
        (home / name).mkdir(parents=True)
        (home / name / "file").write_bytes(b"x" * 100)
    listed = run("cache").out
    assert "make real-model" in unfolded(listed) and "make llama-cpp" in unfolded(listed)
    done = run("cache", "--clear")
    assert done.code == 0 and "200 B removed" in done.out
    assert sorted(place.name for place in home.iterdir()) == ["llama-cpp", "real", "traces"]
    assert "acip-export cache --clear llama-cpp real traces" in unfolded(done.out)
    again = json.loads(run("cache", "--clear", "--json").out)
    assert (again["bytes"], [each["name"] for each in again["left"]]) == (0, ["llama-cpp", "real", "traces"])
    assert "left" not in run("cache", "--clear", "real").out
    assert sorted(place.name for place in home.iterdir()) == ["llama-cpp", "traces"]


def unfolded(text: str) -> str:
    return " ".join(text.split())
