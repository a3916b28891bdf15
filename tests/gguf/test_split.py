"""A model in several files: sizes, keys and numbers; run by llama.cpp; sets of parts that do not belong together."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acip_export import api as pipeline
from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import Plan, Serving, load_plan
from acip_export.errors import ModelFileError, UsageError
from acip_export.formats.registry import export_format
from acip_export.inspection import read_anatomy
from acip_export.inspection.gguf_split import PartName, part_names, read_parts
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import Budget, PlanRequest, Problem, resolve
from converters.gguf import converter
from converters.gguf.arrange import ADAPTER_FILE, MODEL_FILE, Item, model_file
from converters.gguf.options import PART_HEAD, file_notes, tensor_limit
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from converters.gguf.runtimes.llama_encoder import LlamaEncoderSession
from converters.gguf.runtimes.llama_server import ServerSession
from converters.gguf.split import Contents, split
from converters.gguf.writer import GgufWriter, TensorSpec, string
from tests.encoders import make_encoder
from tests.gguf.conftest import Rule
from tests.gguf.test_writer import specs
from tests.planning.problems import Shape, examples, shapes
from tests.support import (
    Run,
    dense,
    everywhere,
    make_bundle,
    make_model,
    make_plan,
    make_scores,
    needs_factor_pairs,
    unspaced,
)

PAIR = {"rank": 64, "up_type": "f16", "down_type": "f16", "embedding_type": "q8_0"}
RULES: dict[str, Rule] = {
    "stock": dense(type="q8_0"),
    "lora": everywhere(representation="lora", type="q1_0", **PAIR),
    "factored": everywhere(representation="factored", **PAIR),
}
LAYOUTS = ["stock", "lora", pytest.param("factored", marks=needs_factor_pairs)]
# The embedding of the tiny model takes 139 kB, its tokenizer less.
SIZE = 150_000
# Enough to choose from, and measured in no time.
TYPES = ("f16", "q8_0", "q4_0")
IDENTITY = {"acip.plan_sha256": string("0" * 64), "acip.version": string("1")}


def splitting(size: int) -> Checkpoint:
    """All that splitting asks of a checkpoint."""
    return SimpleNamespace(options={"split_max_size": str(size)})  # type: ignore[return-value]


def contents_of(tensors: list[TensorSpec], key_bytes: int = 100) -> Contents:
    metadata = {**IDENTITY, "general.architecture": string("llama"), "filler": string("x" * key_bytes)}
    return Contents(metadata, tuple(Item(spec, None) for spec in tensors))


def smallest(contents: Contents) -> int:
    """By asking: every refusal names the size that would do for what it is about."""
    size = 1
    while True:
        try:
            split("model.gguf", contents, splitting(size))
        except UsageError as error:
            wanted = int(re.search(r"at least  (\d+)B", str(error))[1])  # type: ignore[index]
            assert wanted > size
            size = wanted
        else:
            return size


@settings(max_examples=examples(40, 1000), deadline=None)
@given(
    tensors=specs(st.text("ab.é日_", min_size=1, max_size=12)),
    key_bytes=st.integers(0, 4000),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_no_file_is_larger_and_nothing_is_lost(
    tensors: list[TensorSpec], key_bytes: int, share: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("split")
    contents = contents_of(tensors, key_bytes)
    least = smallest(contents)
    size = least + int(share * (contents.nbytes - least)) if contents.nbytes > least else least
    files = split("model.gguf", contents, splitting(size))
    generator = np.random.default_rng(seed)
    numbers = {spec.name: generator.integers(0, 256, spec.nbytes, np.uint8) for spec in tensors}
    for name, part in files.items():
        with GgufWriter(folder / name, part.metadata, part.specs) as writer:
            for spec in part.specs:
                writer.write(spec.name, numbers[spec.name])
        assert (folder / name).stat().st_size == part.nbytes <= size
    assert [spec for part in files.values() for spec in part.specs] == tensors
    if len(files) == 1:
        assert list(files) == ["model.gguf"]
        assert contents.nbytes <= size
        return
    assert contents.nbytes > size
    # By a reader that is not ours.
    readers = [gguf.GGUFReader(folder / name) for name in files]
    for number, (name, reader) in enumerate(zip(files, readers, strict=True)):
        assert name == f"model-{number + 1:05d}-of-{len(files):05d}.gguf"
        keys = {key: field for key, field in reader.fields.items() if key.startswith("split.")}
        found = {key: (field.types, field.contents()) for key, field in keys.items()}
        assert found == {
            "split.no": ([gguf.GGUFValueType.UINT16], number),
            "split.count": ([gguf.GGUFValueType.UINT16], len(files)),
            "split.tensors.count": ([gguf.GGUFValueType.INT32], len(tensors)),
        }
        assert ("general.architecture" in reader.fields) == (number == 0)
        assert reader.fields["acip.plan_sha256"].contents() == "0" * 64
    read = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    assert list(read) == [spec.name for spec in tensors]
    for name, data in numbers.items():
        assert read[name].data.tobytes() == data.tobytes()
    parts = read_parts(folder / next(iter(files)))
    assert [tensor.name for part in parts for tensor in part.head.tensors] == list(read)
    # Every file is as full as the order of the tensors allows.
    for part, following in zip(list(files.values())[:-1], list(files.values())[1:], strict=True):
        assert Contents(part.metadata, (*part.items, following.items[0])).nbytes > size


@settings(deadline=None, max_examples=examples(4, 60), suppress_health_check=list(HealthCheck))
@given(
    shape=shapes(most_layers=2, widest=512),
    layout=st.sampled_from(["stock", "factored"]),
    share=st.floats(0, 1),
    budget=st.floats(0.05, 0.9),
)
def test_planned_exports_keep_to_the_size(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, layout: str, share: float, budget: float
) -> None:
    """Random models, budgets and sizes, the latter from just above what is refused to all of the model."""
    directory = tmp_path_factory.mktemp("planned")
    model = make_model(directory / "model", shape.arch, **shape.settings)
    scores = make_scores(model)

    serving = Serving(64, "f16", 64)

    def problem_of(size: int) -> Problem:
        options = {"split_max_size": str(size)}
        checkpoint = Checkpoint.open(model).with_options(options)
        space = resolve(PlanRequest("gguf", layout=layout, options=options), checkpoint).space
        return Problem.of(checkpoint, scores, space)

    least, refusals = 1, 0
    while True:
        try:
            problem_of(least).floor("file", serving)
            break
        except UsageError as error:
            least = int(re.search(r"at least  (\d+)B", str(error))[1])  # type: ignore[index]
            refusals += 1
    assert refusals > 0
    size = int(least * (Checkpoint.open(model).weight_bytes / least) ** share)
    problem = problem_of(size)
    wanted = problem.floor("file", serving).nbytes + int(budget * Checkpoint.open(model).weight_bytes)
    plan = problem.plan(Budget(wanted, "file"), serving)
    assert plan.planned_bytes <= wanted
    bundle = make_bundle(model, plan, directory / "bundle", scores)
    pipeline.convert_bundle(bundle.path, directory / "export")  # compares with the planned bytes
    written = {file.name: file.stat().st_size for file in (directory / "export").glob("*.gguf")}
    assert written == plan.files
    assert max(written.values()) <= size
    assert (MODEL_FILE in written) == (len(written) == 1)


def test_what_planning_keeps_free_for_the_head_is_enough() -> None:
    """A name as long as GGUF allows (64 bytes with its end), and a version as long as they get."""
    contents = contents_of([TensorSpec(letter * 63, (1001, 32), "q8_0") for letter in "ab"])
    metadata = {**contents.metadata, "acip.version": string("10.20.30.dev400+g0123456789ab")}
    metadata |= {"acip.model_fingerprint": string("0" * 64)}
    nbytes = contents.specs[0].nbytes
    files = split("model.gguf", Contents(metadata, contents.items), splitting(nbytes + PART_HEAD))
    *_, last = files.values()
    assert len(last.specs) == 1
    assert 0.7 * PART_HEAD < last.nbytes - nbytes <= PART_HEAD
    limit = tensor_limit({"split_max_size": str(100 + PART_HEAD)})
    assert limit is not None and limit.nbytes == 100


def plan_of(model: Path, layout: str, size: int | None, rule: Rule | None = None, **options: str) -> Plan:
    """With its files, as planning gives it."""
    options |= {} if size is None else {"split_max_size": str(size)}
    made = dataclasses.replace(make_plan(model, "gguf", layout, rule or RULES[layout]), options=options)
    checkpoint = Checkpoint.open(model).with_options(options)
    files = converter.predict_files(checkpoint, layout, made.tensors, made.serving)
    total = sum(files.values())
    return dataclasses.replace(
        made, files=files, planned_bytes=total, memory_bytes=total, breakdown={"weights": total}, budget_bytes=2 * total
    )


def exported(model: Path, plan: Plan, directory: Path) -> tuple[Bundle, Path]:
    bundle = make_bundle(model, plan, directory / "bundle", make_scores(model, directory / "scores.acip"))
    pipeline.convert_bundle(bundle.path, directory / "export")
    return bundle, directory / "export"


@pytest.fixture(scope="module")
def exports(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int | None], Path]:
    """``exports(layout, size)``, made once; tests that change one take a copy."""
    made: dict[tuple[str, int | None], Path] = {}

    def make(layout: str, size: int | None) -> Path:
        if (layout, size) not in made:
            plan = plan_of(model, layout, size)
            made[layout, size] = exported(model, plan, tmp_path_factory.mktemp("export"))[1]
        return made[layout, size]

    return make


def keys_and_tensors(files: list[Path]) -> tuple[dict[str, Any], dict[str, tuple[Any, bytes]]]:
    """By gguf-py: of the first file, and of all."""
    readers = [gguf.GGUFReader(file) for file in files]
    keys = {key: field.contents() for key, field in readers[0].fields.items() if not key.startswith("GGUF.")}
    data = {t.name: (t.tensor_type, t.data.tobytes()) for reader in readers for t in reader.tensors}
    return keys, data


@pytest.mark.parametrize("layout", ["stock", "lora", "factored"])
def test_the_numbers_are_those_of_the_whole_export(layout: str, exports: Callable[[str, int | None], Path]) -> None:
    whole, parted = exports(layout, None), exports(layout, SIZE)
    parts = sorted(parted.glob("model-*.gguf"))
    assert len(parts) > 2
    assert not (parted / MODEL_FILE).exists()
    assert all(part.stat().st_size <= SIZE for part in parts)
    keys, tensors = keys_and_tensors(parts)
    expected, whole_tensors = keys_and_tensors([whole / MODEL_FILE])
    assert tensors == whole_tensors
    changed = {"acip.plan_sha256", "split.no", "split.count", "split.tensors.count"}
    assert {k: v for k, v in keys.items() if k not in changed} == {
        k: v for k, v in expected.items() if k not in changed
    }
    if layout == "lora":
        adapter, expected_adapter = keys_and_tensors([parted / ADAPTER_FILE]), keys_and_tensors([whole / ADAPTER_FILE])
        assert adapter[1] == expected_adapter[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llama_cpp_computes_what_it_does_from_one_file(layout: str, exports: Callable[[str, int | None], Path]) -> None:
    """The same code on the same numbers: equal to the last bit."""
    windows = np.random.default_rng(1).integers(3, 512, (1, 40))
    found = []
    for export in (exports(layout, None), exports(layout, SIZE)):
        with LlamaCppSession(export, Serving(64, "f16", 16), threads=1) as session:
            found.append((np.concatenate(list(session.logits(windows))), session.greedy([5, 6, 7], 8)))
    assert np.array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_the_server_of_xllamacpp_opens_the_first_part(exports: Callable[[str, int | None], Path]) -> None:
    with ServerSession(exports("lora", SIZE), Serving(64, "f16", 16), 1) as session:
        assert len(session.greedy([5, 6, 7], 2)) == 2


def test_encoders_are_split_alike(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    rule = everywhere(representation="dense", type="q8_0", embedding_type="f32")

    def decide(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        linear = name.removesuffix(".weight") in Checkpoint.open(model).linear_modules
        return rule(name, shape) if linear else {"representation": "dense", "type": "f32"}

    found = []
    for size in (None, 80_000):
        made = dataclasses.replace(
            make_plan(model, "gguf", "stock", decide, context=48, prompt_batch=48),
            options={} if size is None else {"split_max_size": str(size)},
        )
        bundle = make_bundle(model, made, tmp_path / f"bundle{size}")
        out = tmp_path / f"export{size}"
        out.mkdir()
        converter.convert(bundle, out, lambda _: None)
        with LlamaEncoderSession(out, Serving(48, "f16", 48), threads=1) as session:
            found.append(session.outputs([[2, 7, 9, 3], [2, 11, 3]]))
    assert len(list(out.iterdir())) > 1
    assert np.array_equal(found[0], found[1])


def test_programs_are_told_the_first_part(exports: Callable[[str, int | None], Path]) -> None:
    export = exports("lora", SIZE)
    plan = load_plan(export / "plan.json")
    count = len(plan.files) - 1
    texts = {c.program: c for c in export_format("gguf").run_commands(plan, Path("out"))}
    first = f"out/model-00001-of-{count:05d}.gguf"
    for program in ("llama-server", "llama-cli", "llama-cpp-python", "node-llama-cpp"):
        assert first in texts[program].text
        assert "-00002-of-" not in texts[program].text
    # Ollama copies what it is told, and puts the parts of one name together.
    froms = [line for line in texts["Ollama"].text.splitlines() if line.startswith("FROM ")]
    assert froms == [f"FROM ./out/{name}" for name in part_names(MODEL_FILE, count)]
    assert "ADAPTER ./out/adapter.gguf" in texts["Ollama"].text
    assert "0.30" in texts["Ollama"].note
    whole = load_plan(exports("lora", None) / "plan.json")
    assert not any("0.30" in c.note for c in export_format("gguf").run_commands(whole, Path("out")))


def test_planning_takes_types_that_fit_a_file(model: Path) -> None:
    """Of half a megabyte of budget too much, the embedding's 262 kB in f16 would come first; 150 kB hold q8_0."""
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    request = PlanRequest("gguf", 10**9, "file", types=TYPES, context=64)
    rich = pipeline.plan_export(checkpoint, scores, request)
    formats = {d.name: d.type for d in rich.tensors}
    assert formats["model.embed_tokens.weight"] == "f16"
    limited = pipeline.plan_export(
        checkpoint, scores, dataclasses.replace(request, options={"split_max_size": str(SIZE)})
    )
    assert {d.name: d.type for d in limited.tensors}["model.embed_tokens.weight"] == "q8_0"
    assert max(limited.files.values()) <= SIZE
    reasons = {(r.type, r.reason) for r in limited.certificate.refused_types}
    assert ("f16", "in this type it is larger than a file of --split-max-size") in reasons
    assert limited.notes == rich.notes


def test_an_adapter_is_one_file_and_the_plan_says_so(model: Path) -> None:
    wide = everywhere(
        representation="lora", type="q1_0", rank=128, up_type="f32", down_type="f32", embedding_type="q8_0"
    )
    plan = plan_of(model, "lora", SIZE, wide)
    assert plan.files[ADAPTER_FILE] > SIZE
    assert max(size for name, size in plan.files.items() if name != ADAPTER_FILE) <= SIZE
    (note,) = file_notes(plan.files, plan.options)
    assert note.startswith(f"adapter.gguf has {plan.files[ADAPTER_FILE]:,} bytes")
    assert "one file only" in note
    assert file_notes(plan.files, {}) == ()


# --- from the command line


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(tmp_path_factory.mktemp("ranked") / "tiny")
    checkpoint = Checkpoint.open(model)
    space = resolve(PlanRequest("gguf", types=TYPES), checkpoint).space
    pipeline.rounding_errors(checkpoint, make_scores(model), space)
    return model


@pytest.mark.slow
def test_export_verify_report_inspect_and_check(ranked: Path, tmp_path: Path, run: Run, monkeypatch: Any) -> None:
    model = Path(shutil.copytree(ranked, tmp_path / "tiny"))
    monkeypatch.chdir(model)
    done = run("--budget", "900kB", "--budget-scope", "file", "--format", "gguf", "--context", "64",
               "--types", ",".join(TYPES), "--split-max-size", "150kB", "--json")  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(done.out)["report"]
    assert report["passed"]
    export = Path("export", "gguf-900kB")
    names = [file.name for file in sorted(export.glob("*.gguf"))]
    assert names == list(part_names(MODEL_FILE, len(names)))
    assert len(names) > 3
    assert [file["name"] for file in report["files"]] == names
    assert all(file["bytes"] == file["planned_bytes"] <= 150_000 for file in report["files"])
    assert names[0] in (export / "README.md").read_text()
    again = run("verify", export, "--model", model)
    assert again.code == 0, again.err
    assert run("report", export).code == 0
    for path in (export, export / names[0]):
        seen = json.loads(run("inspect", path, "--json").out)
        assert seen["total_bytes"] == report["written_bytes"]
        assert len(seen["tensors"]) == report["structure"]["found"]
        assert list(seen["files"]) == names
    other = run("inspect", export / names[1])
    assert other.code == 3
    assert unspaced(f"name the first: {names[0]}") in unspaced(other.err)
    (model / "acip-check.toml").write_text(f'[[check]]\nname = "m"\npath = "{export}/{names[0]}"\nmax_growth = "0%"\n')
    assert run("check", "--update").code == 0
    assert run("check").code == 0
    (export / names[2]).unlink()
    gone = run("check")
    assert gone.code != 0
    assert unspaced(f"{names[2]} is missing") in unspaced(gone.err + gone.out)
    failed = run("verify", export, "--model", model)
    assert failed.code == 6
    assert unspaced(f"{names[2]}: no bytes written") in unspaced(failed.err + failed.out)


ASK = ("--budget", "900kB", "--budget-scope", "file", "--context", "64")
ASK_GGUF = (*ASK, "--format", "gguf", "--types", ",".join(TYPES))
BAD = [
    (("--format", "gguf", "--split-max-size", "0MB"), 2, "--split-max-size '0MB' must be more than zero"),
    (("--format", "gguf", "--split-max-size", "-1MB"), 2, "--split-max-size '-1MB' must be more than zero"),
    (("--format", "gguf", "--split-max-size", "2000000"), 2, "--split-max-size '2000000' has no unit"),
    (("--format", "gguf", "--split-max-size", "2GG"), 2, "unknown unit"),
    (
        ("--format", "gguf", "--split-max-size", "5kB"),
        2,
        "5000B is too small: model.embed_tokens.weight takes",
    ),
    (("--format", "onnx", "--split-max-size", "1GB"), 5, "onnx exports have no --split-max-size"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), BAD, ids=lambda value: str(value)[:60])
def test_sizes_that_are_refused(
    arguments: tuple[str, ...], code: int, says: str, ranked: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ranked)
    before = sorted(ranked.rglob("*"))
    done = run(*ASK, *arguments)
    assert done.code == code, done.err
    assert unspaced(says) in unspaced(done.err)
    assert done.out == ""
    assert sorted(ranked.rglob("*")) == before


def test_a_tokenizer_that_fits_no_file_is_refused(model: Path) -> None:
    plan = make_plan(model, "gguf", "stock", dense(type="q8_0"))
    checkpoint = Checkpoint.open(model).with_options({"split_max_size": "9000"})
    with pytest.raises(UsageError, match=r"metadata and tokenizer take [\d,]+ bytes; give at least  \d+B"):
        converter.predict_files(checkpoint, "stock", plan.tensors, plan.serving)


def test_a_plan_with_a_hostile_size_is_refused(model: Path, tmp_path: Path, run: Run) -> None:
    plan = plan_of(model, "stock", SIZE)
    bundle = make_bundle(model, plan, tmp_path / "bundle")
    for value in ("-5", "many", "1e6", "", "0"):
        data = json.loads((bundle.path / "plan.json").read_text())
        data["options"]["split_max_size"] = value
        (bundle.path / "plan.json").write_text(json.dumps(data))
        done = run("convert", bundle.path, "-o", tmp_path / "out")
        assert done.code == 3, done.err
        assert unspaced("expected a number of bytes") in unspaced(done.err)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


# --- sets of parts that are none


def _drop(parts: list[Path]) -> None:
    parts[1].unlink()


def _swap(parts: list[Path]) -> None:
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    parts[2].write_bytes(second)


def _truncate(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-40])


def _renumber(parts: list[Path]) -> None:
    parts[0].rename(parts[0].with_name(f"model-00001-of-{len(parts) + 1:05d}.gguf"))


def _rename(parts: list[Path]) -> None:
    parts[0].rename(parts[0].with_name("renamed.gguf"))


def _overwrite(name: bytes, value: bytes, part: int) -> Callable[[list[Path]], None]:
    """The value of a key, its type left as it is."""

    def harm(parts: list[Path]) -> None:
        data = parts[part].read_bytes()
        at = data.index(name) + len(name) + 4
        parts[part].write_bytes(data[:at] + value + data[at + len(value) :])

    return harm


def _twice(parts: list[Path]) -> None:
    """A part that holds what another one does: the count of tensors still adds up."""
    names = {part: [tensor.name for tensor in gguf.GGUFReader(part).tensors] for part in parts}
    first, second, own, other = next(
        (a, b, x, y) for a in parts for b in parts if a < b for x in names[a] for y in names[b] if len(x) == len(y)
    )
    assert (first, own) != (second, other)
    second.write_bytes(second.read_bytes().replace(other.encode(), own.encode()))


HARMS: dict[str, tuple[Callable[[list[Path]], None], str]] = {
    "missing": (_drop, r"-00002-of-\d+\.gguf is missing: .* is the first of \d+ parts"),
    "reordered": (_swap, r"is part 3 of \d+ by its metadata, and part 2 of \d+ by its name"),
    "truncated": (_truncate, "truncated or damaged"),
    "another count in the name": (_renumber, "its name does not say so; call it NAME-00001-of-"),
    "renamed": (_rename, "its name does not say so; call it NAME-00001-of-"),
    "count of tensors": (_overwrite(b"split.tensors.count", b"\x07\0\0\0", 0), "they differ in split.tensors.count"),
    "of another export": (_overwrite(b"acip.plan_sha256", b"\x40\0\0\0\0\0\0\0" + b"f" * 64, 1), "differ in acip.pl"),
    "negative count": (_overwrite(b"split.tensors.count", b"\xff\xff\xff\xff", 0), "differ in split.tensors.count"),
    "a part of a larger set": (_overwrite(b"split.count", b"\x63\0", 1), "is part 2 of 99 by its metadata"),
    "no set by its first part": (_overwrite(b"split.no", b"\x05\0", 0), "is part 6 of"),
    "a tensor twice": (_twice, "is in .* and "),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMS)
def test_parts_that_do_not_belong_together(
    case: str, exports: Callable[[str, int | None], Path], ranked: Path, tmp_path: Path, run: Run
) -> None:
    """Looked at, and taken as a base."""
    harm, says = HARMS[case]
    copy = Path(shutil.copytree(exports("stock", SIZE), tmp_path / "export"))
    harm(sorted(copy.glob("model-*.gguf")))
    first = next((file for file in sorted(copy.glob("*.gguf")) if "-00001-of" in file.name), copy / "renamed.gguf")
    with pytest.raises(ModelFileError, match=says):
        read_anatomy(first)
    looked = run("inspect", first)
    assert looked.code == ModelFileError.exit_code
    based = run("plan", "--model", ranked, *ASK_GGUF, "--base-gguf", first)
    assert based.code == ModelFileError.exit_code, based.err
    for message in (looked.err, based.err):
        assert re.search(unspaced(says), unspaced(message)), message


def test_verify_notices_a_part_of_another_export(model: Path, tmp_path: Path, run: Run) -> None:
    """Of the same sizes and names: llama.cpp would run it."""
    plan = plan_of(model, "stock", SIZE)
    bundle, export = exported(model, plan, tmp_path)
    other = dataclasses.replace(plan, notes=("another",))
    _, foreign = exported(model, other, tmp_path / "other")
    parts = sorted(export.glob("model-*.gguf"))
    shutil.copy(foreign / parts[1].name, parts[1])
    done = run("verify", export, "--bundle", bundle.path, "--model", model)
    assert done.code == 6, done.err
    assert unspaced("is a part of another model") in unspaced(done.err + done.out)


def test_names_of_parts() -> None:
    assert part_names("model.gguf", 1) == ("model.gguf",)
    assert part_names("model.gguf", 2) == ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf")
    assert PartName.parse("a-00001-of-00002-00003-of-00004.gguf") == PartName("a-00001-of-00002", 3, 4)
    for name in ("model.gguf", "model-1-of-2.gguf", "model-00001-of-00002.safetensors", "-00001-of-00002.gguf"):
        assert PartName.parse(name) is None


def test_which_file_is_opened(tmp_path: Path) -> None:
    assert model_file(tmp_path / "nowhere") == tmp_path / "nowhere" / MODEL_FILE
    for name in (
        "adapter.gguf",
        "model-00002-of-00002.gguf",
        "model-00001-of-00002.gguf",
        "models-00001-of-00009.gguf",
    ):
        (tmp_path / name).touch()
    assert model_file(tmp_path).name == "model-00001-of-00002.gguf"
    (tmp_path / MODEL_FILE).touch()
    assert model_file(tmp_path).name in (MODEL_FILE, "model-00001-of-00002.gguf")
