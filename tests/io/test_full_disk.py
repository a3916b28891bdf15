"""A disk that takes no more: the kernel's own error, at every stage that writes. Nothing is left, nothing is harmed."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from acip_export.api import convert_bundle, materialize_bundle, plan_export
from acip_export.artifacts.names import WEIGHTS_FILE
from acip_export.artifacts.plan import save_plan
from acip_export.errors import OutputError
from acip_export.io.atomic import new_directory, new_file
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from tests.support import Run, make_model, make_scores

TYPES = {"gguf": ("q8_0", "q4_0"), "onnx": ("int8", "int4")}


@contextmanager
def no_file_larger_than(most: int) -> Iterator[None]:
    """The kernel refuses every write beyond; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``made(target)``: a directory with ``model``, ``plan.json``, ``bundle`` and ``export``."""
    found: dict[str, Path] = {}

    def make(target: str) -> Path:
        if target not in found:
            place = tmp_path_factory.mktemp(target)
            model = make_model(place / "model", num_hidden_layers=1)
            checkpoint, scores = Checkpoint.open(model), make_scores(model)
            request = PlanRequest(target, 600_000, "file", types=TYPES[target], context=64)
            plan = plan_export(checkpoint, scores, request)
            save_plan(plan, place / "plan.json")
            materialize_bundle(checkpoint, scores, plan, place / "bundle")
            convert_bundle(place / "bundle", place / "export")
            found[target] = place
        return found[target]

    return make


def contents(directory: Path) -> dict[str, bytes]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize("stage", ["convert", "materialize", "export"])
def test_a_full_disk(stage: str, target: str, made: Callable[[str], Path], run: Run) -> None:
    place = made(target)
    before = contents(place)
    written = {name: len(data) for name, data in before.items()}
    largest = max(size for name, size in written.items() if name.startswith("export/"))
    model = ("--model", place / "model")
    command = {
        "convert": ("convert", place / "bundle", "-o", place / "export", "--force"),
        "materialize": ("materialize", place / "plan.json", *model, "-o", place / "bundle", "--force"),
        "export": (*model, "--budget", "600kB", "--budget-scope", "file", "--format", target, "--types",
                   ",".join(TYPES[target]), "--context", "64", "-o", place / "export", "--force"),
    }[stage]  # fmt: skip
    # Small files pass: it is the numbers that meet the limit, in the middle of a file.
    limit = (written[f"bundle/{WEIGHTS_FILE}"] if stage == "materialize" else largest) - 20_000
    with no_file_larger_than(limit):
        done = run(*command)
    assert done.code == OutputError.exit_code == 2, done.err
    message = " ".join(done.err.split())
    assert "cannot be written: File too large; nothing was left there" in message
    assert "Make room, or choose another place with -o" in message
    assert contents(place) == before
    assert run(*command).code == 0, "and it works once there is room"


def test_the_file_layer(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("old")
    with no_file_larger_than(1000):
        with (
            pytest.raises(OutputError, match="kept cannot be written"),
            new_file(tmp_path / "kept") as file,
        ):
            file.write_bytes(bytes(2000))
        with pytest.raises(OutputError, match="out cannot be written"), new_directory(tmp_path / "out") as directory:
            (directory / "half").write_bytes(bytes(2000))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"below cannot be written: (Not a directory|File exists); nothing was left there\. Choose another place"
    for open_ in (new_file, new_directory):
        with pytest.raises(OutputError, match=message), open_(tmp_path / "file" / "below"):
            pytest.fail("must not start")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_directory(tmp_path / "out"):
        (tmp_path / "nowhere").read_bytes()
    assert list(tmp_path.iterdir()) == []
