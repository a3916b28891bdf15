"""One small file per family of models, and the table of them."""

from acip_export.errors import UnsupportedError
from converters.gguf.architectures import llama, qwen2, qwen3
from converters.gguf.architectures.base import Family

_FAMILIES = (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
_BY_CLASS = {name: family for family in _FAMILIES for name in family.classes}


def family_of(architecture: str) -> Family:
    """The family of a Hugging Face class. Raises UnsupportedError, which lists the supported ones."""
    if architecture not in _BY_CLASS:
        raise UnsupportedError(
            f"{architecture} cannot be written as GGUF by this tool; it writes {', '.join(sorted(_BY_CLASS))}"
        )
    return _BY_CLASS[architecture]


__all__ = ["Family", "family_of"]
