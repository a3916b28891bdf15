"""``acip-export inspect``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from acip_export.artifacts.names import ANATOMY_DIFF, PLAN_FILE
from acip_export.cli import output as console
from acip_export.cli.options import Debug, Json, Quiet
from acip_export.cli.tables.inspect import change_json, show_anatomy, show_difference, show_exports
from acip_export.errors import UsageError
from acip_export.inspection import Anatomy, diff_tensors, read_anatomy
from acip_export.inspection.diff import Stored, stored_tensors


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A .gguf, .onnx, .safetensors, score file, plan or directory.")
    ],
    other: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="A second one: what differs, tensor by tensor.")
    ] = None,
    top: Annotated[int, typer.Option(help="Tensors, groups of layers, or changes to list: the largest.", min=0)] = 10,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show where the bytes of any model are, or what differs between two.

    Of a directory that holds exports side by side, list them.

    acip-export inspect export/gguf-4GB

    acip-export inspect export

    acip-export inspect old.gguf new.gguf

    acip-export inspect . export/gguf-4GB
    """
    from acip_export.report.listing import directories_of_exports, list_exports, listing_json

    if other is not None:
        _refuse_several(path, other)
    elif exports := directories_of_exports(path):
        listed = list_exports(exports)
        if json:
            console.print_json(listing_json(listed))
        else:
            show_exports(listed)
        return
    first = read_anatomy(path)
    if other is None:
        if json:
            console.print_json(first.to_json())
        else:
            show_anatomy(first, top)
        return
    second = read_anatomy(other)
    changes = diff_tensors(*_alike_named(first, second))
    if json:
        console.print_json(
            {
                "artifact": ANATOMY_DIFF.artifact,
                "version": ANATOMY_DIFF.version,
                "before": _totals(first),
                "after": _totals(second),
                "delta": second.total_bytes - first.total_bytes,
                "changes": [change_json(change) for change in changes],
            }
        )
    else:
        show_difference(first, second, changes, top)


def _refuse_several(path: Path, other: Path) -> None:
    """Exports side by side are no model that differs from another one.

    Raises:
        UsageError: one of the two is a directory that holds them.
    """
    from acip_export.report.listing import directories_of_exports

    found = {each: directories_of_exports(each) for each in (path, other)}
    for each, exports in found.items():
        if exports:
            named = [str(found[one][0] if found[one] else one) for one in (path, other)]
            raise UsageError(
                f"{each} is no model: it holds {', '.join(export.name for export in exports)}; compare one of them:\n"
                f"  {shlex.join(['acip-export', 'inspect', *named])}"
            )


def _alike_named(first: Anatomy, second: Anatomy) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """The tensors of both; of an export beside a model those of its plan, which are named as the model's are."""
    kinds = {first.kind, second.kind}
    before, after = (
        read_anatomy(Path(each.path) / PLAN_FILE) if each.kind == "export" and "model" in kinds else each
        for each in (first, second)
    )
    return stored_tensors(before), stored_tensors(after)


def _totals(anatomy: Anatomy) -> dict[str, Any]:
    return {
        "path": anatomy.path,
        "kind": anatomy.kind,
        "total_bytes": anatomy.total_bytes,
        "tensor_bytes": anatomy.tensor_bytes,
        "overhead_bytes": anatomy.overhead_bytes,
    }
