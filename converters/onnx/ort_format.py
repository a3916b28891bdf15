"""The ORT format: what a reduced build of onnxruntime for a phone loads.

A finished export becomes a directory of its own: one ``model.ort`` (the optimized graph and its weights), the list
of operators and types that the reduced build has to contain, and the tokenizer and configuration files.

Source: onnxruntime's documentation, "ORT model format" and "Custom build: reduced operator config file".
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from acip_export.artifacts.names import PAPERS
from acip_export.errors import UnsupportedError
from acip_export.io.outputs import DirectoryKind, FileKind, claim_output, sizes_below
from converters.onnx.companion_files import DATA_FILE, MODEL_FILE

ORT_FILE = "model.ort"
OPERATORS_FILE = "required_operators_and_types.config"
# Flatbuffers address their content with signed 32-bit offsets.
_LARGEST = 2**31 - 1
_SHOWN = 1500
# The list of operators is the one file that takes comments: in them it says what was written beside it.
_OPERATORS_KIND = FileKind("a list of operators", re.compile(rb"# acip-export: "))
_LISTED = re.compile(r"^# acip-export: (\d+) (.+)$", re.MULTILINE)


def _contents(directory: Path) -> Mapping[str, int | FileKind]:
    file = directory / OPERATORS_FILE
    if not file.is_file() or not _OPERATORS_KIND.wrote(file):
        return {}
    listed = _LISTED.findall(file.read_text(encoding="utf-8", errors="replace"))
    return {**{name: int(size) for size, name in listed}, OPERATORS_FILE: _OPERATORS_KIND}


ORT_KIND = DirectoryKind("an export in the ORT format", _contents)


def write_ort(export: Path, out: Path, force: bool = False) -> dict[str, int]:
    """Write the ORT-format sibling of an ONNX export; returns its bytes by file.

    Raises:
        UnsupportedError: the export is no ONNX export, is larger than the format can address, or onnxruntime's
            conversion fails; its output is part of the message.
        UsageError: ``out`` may not be written; see :func:`acip_export.io.outputs.claim_output`.
    """
    parts = [export / MODEL_FILE, export / DATA_FILE]
    if not all(part.is_file() for part in parts):
        raise UnsupportedError(f"{export} is no ONNX export: the ORT format is made from {MODEL_FILE} and {DATA_FILE}")
    output = claim_output(out, ORT_KIND, force, (export,))
    check_size({MODEL_FILE: parts[0].stat().st_size, DATA_FILE: parts[1].stat().st_size})
    with output.new_directory() as directory:
        _convert(parts[0], directory)
        for file in sorted(export.glob("*")):
            if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name not in PAPERS:
                shutil.copyfile(file, directory / file.name)
        _list_files(directory)
    return {file.name: file.stat().st_size for file in sorted(out.iterdir())}


def check_size(files: Mapping[str, int]) -> None:
    """Raises UnsupportedError when an export of these bytes by file is larger than the ORT format can address."""
    total = files[MODEL_FILE] + files[DATA_FILE]
    if total > _LARGEST:
        raise UnsupportedError(
            f"the graph and its numbers have {total:,} bytes; the ORT format holds at most {_LARGEST:,}. "
            "Plan for a smaller --budget, or leave --ort out"
        )


def _convert(model: Path, directory: Path) -> None:
    """In a process of its own: onnxruntime's tool prints, and sets the log level of the whole process."""
    command = [sys.executable, "-P", "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(model)]
    # "Fixed": optimized here once, not again at every start on the device. "arm": nothing specific to this machine.
    command += ["--output_dir", str(directory), "--optimization_style", "Fixed", "--target_platform", "arm"]
    done = subprocess.run([*command, "--enable_type_reduction"], capture_output=True, text=True)
    converted = directory / f"{model.stem}.ort"
    operators = directory / f"{model.stem}.{OPERATORS_FILE}"
    if done.returncode or not (converted.is_file() and operators.is_file()):
        raise UnsupportedError(f"onnxruntime cannot convert {model}:\n{(done.stdout + done.stderr)[-_SHOWN:].strip()}")
    converted.replace(directory / ORT_FILE)
    # It begins with comments that name the temporary directory.
    lines = operators.read_text(encoding="utf-8").splitlines(keepends=True)
    operators.unlink()
    kept = "".join(line for line in lines if not line.startswith("#"))
    (directory / OPERATORS_FILE).write_text(kept, encoding="utf-8")


def _list_files(directory: Path) -> None:
    operators = directory / OPERATORS_FILE
    sizes = sizes_below(directory)
    del sizes[OPERATORS_FILE]
    lines = "".join(f"# acip-export: {size} {name}\n" for name, size in sizes.items())
    operators.write_text(lines + operators.read_text(encoding="utf-8"), encoding="utf-8")
