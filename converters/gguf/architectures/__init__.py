"""One small file per family of models; a new file here is a new family."""

from importlib import import_module
from pkgutil import iter_modules

from acip_export.errors import UnsupportedError
from converters.gguf.architectures.base import Change, Family

_MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
FAMILIES: tuple[Family, ...] = tuple(
    value for module in _MODULES for value in vars(module).values() if isinstance(value, Family)
)
"""All families."""

_BY_CLASS = {name: family for family in FAMILIES for name in family.classes}


def family_of(architecture: str) -> Family:
    """Return the family of a Hugging Face class.

    Raises:
        UnsupportedError: there is none; the message lists the supported ones.
    """
    if architecture not in _BY_CLASS:
        raise UnsupportedError(
            f"{architecture} cannot be written as GGUF by this tool alone; it writes {', '.join(sorted(_BY_CLASS))}.\n"
            "For any other that llama.cpp knows:  --base-gguf FILE,  made by its convert_hf_to_gguf.py"
        )
    return _BY_CLASS[architecture]


def applies_window(architecture: str) -> bool:
    """Tell whether llama.cpp knows the sliding window of models of a Hugging Face class."""
    return architecture in _BY_CLASS and _BY_CLASS[architecture].applies_windows


__all__ = ["FAMILIES", "Change", "Family", "applies_window", "family_of"]
