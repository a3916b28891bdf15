"""``optimum-cli export acip``: the main job as a command of Hugging Face optimum, with the same options.

optimum looks for files named ``register_*.py`` in this namespace package; there must be no ``__init__.py`` beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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


_OF_THE_CACHE = {"--cache-type", "--cache-type-k", "--cache-type-v"}


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
            hidden = bool(getattr(option, "hidden", False))
            if not hidden and option.name not in ("help", "version", "install_completion", "show_completion"):
                flag = bool(getattr(option, "is_flag", False))
                text = str(getattr(option, "help", None) or "").replace("%", "%%")
                parser.add_argument(*names, action=_Forward, nargs=0 if flag else None, dest=option.name, help=text)

    def run(self) -> None:
        """Exits as ``acip-export`` does."""
        from acip_export.cli.main import main

        words = [*getattr(self.args, "acip", ())]
        # optimum makes the KV cache itself: without a word of it no type is chosen or suggested that it cannot make.
        sys.argv = ["acip-export", *words, *(() if _OF_THE_CACHE & set(words) else ("--own-cache",))]
        main()


# Read once: where two directories hold this module, as an installation and a checkout on the path do, optimum reads it
# for each of them, and a command that is registered twice ends every optimum-cli.
REGISTER_COMMANDS = iter([(AcipExportCommand, ExportCommand)])
