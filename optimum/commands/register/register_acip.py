"""``optimum-cli export acip``: the main job as a command of Hugging Face optimum, with the same options.

optimum looks for files named ``register_*.py`` in this namespace package; there must be no ``__init__.py`` beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class _Forward(argparse.Action):
    """Collects options as they were written, for the command line that knows what they mean."""

    def __call__(
        self, _parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        words = [] if self.nargs == 0 else [values]
        namespace.acip = [*getattr(namespace, "acip", ()), str(option), *words]


def _for_optimum(words: list[str]) -> list[str]:
    """Ask for the default KV cache where nothing is said of it: optimum makes its own, and of no other type."""
    from acip_export.devices import find_device, load_devices
    from acip_export.errors import AcipError
    from acip_export.formats.protocol import DEFAULT_BACKEND
    from acip_export.formats.registry import export_format

    given = dict(pairwise(words))
    if {"--cache-type", "--cache-type-k", "--cache-type-v"} & given.keys():
        return words
    try:
        name = given.get("--format")
        if name is None and "--device" in given:
            more = given.get("--devices")
            name = find_device(given["--device"], load_devices(None if more is None else Path(more))).default_format
        if name is None:
            return words
        format = export_format(name.lower(), given.get("--backend", DEFAULT_BACKEND).lower())
    except AcipError:
        return words  # the command itself says what is wrong
    return [*words, "--cache-type", next(iter(format.cache_types))] if format.own_caches else words


class AcipExportCommand(BaseOptimumCLICommand):
    """Forwards to ``acip-export``."""

    COMMAND = CommandInfo(name="acip", help="Export a ranked model so that it fits a memory budget (GGUF or ONNX).")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Every option of the main job, read from its own definition."""
        from typer.main import get_command

        from acip_export.cli.main import app

        for option in get_command(app).params:
            names: Sequence[str] = [*option.opts, *option.secondary_opts]
            if option.name not in ("help", "version", "install_completion", "show_completion"):
                flag = bool(getattr(option, "is_flag", False))
                text = str(getattr(option, "help", None) or "").replace("%", "%%")
                parser.add_argument(*names, action=_Forward, nargs=0 if flag else None, dest=option.name, help=text)

    def run(self) -> None:
        """Exits as ``acip-export`` does."""
        from acip_export.cli.main import main

        sys.argv = ["acip-export", *_for_optimum([*getattr(self.args, "acip", ())])]
        main()


REGISTER_COMMANDS = [(AcipExportCommand, ExportCommand)]
