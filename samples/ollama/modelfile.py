"""Prints the Modelfile of a GGUF export:  python modelfile.py EXPORT > Modelfile"""

from __future__ import annotations

import sys
from pathlib import Path

from acip_export.artifacts.plan import load_plan
from acip_export.errors import AcipError, UnsupportedError
from acip_export.formats.registry import export_format


def modelfile(export: Path) -> str:
    """The text of the Modelfile, with absolute paths.

    Raises:
        PlanFileError: no export. UnsupportedError: one that Ollama does not run.
    """
    plan = load_plan(export / "plan.json")
    written_as = export_format(plan.format)
    for command in written_as.run_commands(plan, export.resolve(), written_as.chat_template(export)):
        if command.program == "Ollama":
            cache = f"OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE={plan.serving.cache_type_k}"
            return f"# The server needs  {cache} LLAMA_ARG_CACHE_RAM=0\n{command.text}\n"
    raise UnsupportedError(
        f"{export} is {plan.format} ({plan.layout}) with a KV cache of {plan.serving.cache_types}; Ollama runs gguf, "
        "stock or lora, with one of f16, q8_0 or q4_0"
    )


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python modelfile.py EXPORT")
    try:
        print(modelfile(Path(sys.argv[1])), end="")
    except AcipError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
