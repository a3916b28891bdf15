"""From a path to an anatomy: what kind of file or directory it is decides which reader looks at it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from acip_export.artifacts.document import listed_files
from acip_export.artifacts.export_directory import is_export
from acip_export.artifacts.names import CONFIG_FILE, MANIFEST_FILE, PAPERS, PLAN, PLAN_FILE, SCORES
from acip_export.artifacts.plan import Plan, TensorDecision, load_plan
from acip_export.errors import ModelFileError
from acip_export.inspection.anatomy import Anatomy, Kind, TensorPart, checked_name, fact
from acip_export.inspection.gguf import MAGIC
from acip_export.inspection.gguf_split import PartName, read_gguf
from acip_export.inspection.mapped_file import map_file
from acip_export.inspection.onnx import read_onnx
from acip_export.io.atomic import read_safetensors_header
from acip_export.io.inputs import open_input, read_json

MODEL_SUFFIXES = (".gguf", ".onnx", ".safetensors")

_Contents = tuple[tuple[TensorPart, ...], dict[str, str], dict[str, int]]


def read_anatomy(path: Path) -> Anatomy:
    """Look at a GGUF, ONNX, safetensors or score file, a plan, or a directory with a model, bundle or export.

    The first part of a GGUF model in several files stands for all of them. Only headers are read. A directory counts
    all its files: a model directory with weights at its top only those beside them, any other one everything below it.
    An export does not count its plan and reports.

    Raises:
        ModelFileError: missing, none of these, damaged, truncated or hostile.
        PlanFileError: a damaged plan.
    """
    try:
        if path.is_dir():
            return _directory(path)
        if path.suffix == ".json":
            return _plan(path)
        kind, (tensors, facts, more) = _file(path, path.name)
        return Anatomy(str(path), kind, {path.name: path.stat().st_size, **more}, tensors, facts)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from error


def _file(file: Path, name: str) -> tuple[Kind, _Contents]:
    """By content where it tells, by suffix otherwise: an ONNX file has no magic bytes."""
    with open_input(file, ModelFileError) as stream:
        start = stream.read(9)
    if start[:4] == MAGIC or file.suffix == ".gguf":
        return "gguf", read_gguf(file, name)
    if file.suffix == ".onnx":
        return "onnx", read_onnx(file, name)
    if start[8:9] == b"{" or file.suffix in (".safetensors", ".acip"):
        tensors, facts = _safetensors(file, name)
        return "scores" if facts.get("artifact") == SCORES.artifact else "safetensors", (tensors, facts, {})
    raise ModelFileError(f"{file} is no GGUF, ONNX, safetensors or score file, and no plan (*.json) either")


def _safetensors(file: Path, name: str) -> tuple[tuple[TensorPart, ...], dict[str, str]]:
    with map_file(file):  # refuses Git LFS pointers
        pass
    entries, metadata = read_safetensors_header(file, ModelFileError)
    tensors = tuple(
        TensorPart(checked_name(key.encode(), str(file)), entry.shape, entry.dtype, entry.nbytes, name)
        for key, entry in entries.items()
    )
    return tensors, {fact(key): fact(value) for key, value in metadata.items() if key != "modules"}


def _plan(file: Path) -> Anatomy:
    """The files that a plan promises; its tensors are the model's, before a converter splits or renames them."""
    plan = load_plan(file)
    name = max(plan.files, key=lambda key: plan.files[key], default="")
    tensors = tuple(TensorPart(d.name, d.shape, choice(d), d.nbytes, name) for d in plan.tensors)
    return Anatomy(str(file), "plan", dict(plan.files), tensors, _plan_facts(plan))


def choice(decision: TensorDecision) -> str:
    """What a tensor becomes, in a few characters: ``q4_k``, ``r128 int8``, ``r128 int4·int8``."""
    if decision.rank is None:
        return str(decision.type)
    down, up = decision.down_type, decision.up_type
    return f"r{decision.rank} {down}" if down == up else f"r{decision.rank} {down}·{up}"


def _plan_facts(plan: Plan) -> dict[str, str]:
    return {
        "model": fact(plan.model),
        "format": f"{plan.format} ({plan.layout})",
        "budget": f"{plan.budget_bytes:,} bytes of {plan.budget_scope}",
        "memory": f"{plan.memory_bytes:,} bytes, {plan.process_bytes:,} with the runtime itself",
        "predicted loss": f"{plan.predicted_loss:.4f} {plan.loss_unit} above the dense model",
    }


def _directory(root: Path) -> Anatomy:
    ours = is_export(root)
    at_top = any(root.glob("*.safetensors"))
    found = root.glob("*") if at_top else root.rglob("*")
    files = {
        name: file
        for file in sorted(found)
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
        and not ((name := file.relative_to(root).as_posix()) in PAPERS and ours)
        and not (at_top and _is_ours_beside_a_model(file))
    }
    models = {name: file for name, file in files.items() if file.suffix in MODEL_SUFFIXES and not _later_part(file)}
    if not models:
        raise ModelFileError(f"{root} holds no model: no {', '.join(f'*{s}' for s in MODEL_SUFFIXES)}")
    kind: Kind = "bundle" if (root / MANIFEST_FILE).is_file() else "export" if ours else "model"
    facts = _plan_facts(load_plan(root / PLAN_FILE)) if kind in ("bundle", "export") else _config_facts(root)
    tensors: list[TensorPart] = []
    for name, file in models.items():
        _, (parts, file_facts, _) = _file(file, name)
        tensors += parts
        facts |= file_facts if len(models) == 1 else {f"{name}: {key}": value for key, value in file_facts.items()}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    return Anatomy(str(root), kind, sizes, _unique(tensors), facts)


def _is_ours_beside_a_model(file: Path) -> bool:
    """Whether it is a score file, a cache beside one, or a plan: no part of the model."""
    return ".acip" in file.suffixes or (file.name == PLAN_FILE and bool(listed_files(file, PLAN)))


def _later_part(file: Path) -> bool:
    """Whether the first part, which is there, stands for this one."""
    part = PartName.parse(file.name)
    return part is not None and part.number > 1 and file.with_name(str(replace(part, number=1))).is_file()


class _Config(msgspec.Struct, frozen=True):
    """What a ``config.json`` says that people want to see."""

    architectures: list[str] | None = None
    model_type: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    vocab_size: int | None = None


def _config_facts(root: Path) -> dict[str, str]:
    """Of a Hugging Face model directory; nothing where there is no readable config."""
    try:
        config = read_json(root / CONFIG_FILE, _Config, ModelFileError)
    except ModelFileError:
        return {}
    return {key: fact(value) for key, value in msgspec.structs.asdict(config).items() if value is not None}


def _unique(tensors: list[TensorPart]) -> tuple[TensorPart, ...]:
    """Two files may use the same names; then each is told apart by its file."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.name] = counts.get(tensor.name, 0) + 1
    return tuple(t if counts[t.name] == 1 else replace(t, name=f"{t.file}: {t.name}") for t in tensors)
