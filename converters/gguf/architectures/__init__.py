"""One small file per family of models, and the table of them."""

from acip_export.errors import UnsupportedError
from converters.gguf.architectures import bert, gemma, granite, llama, olmo2, phi3, qwen2, qwen3, smollm3
from converters.gguf.architectures.base import Change, Family

_FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    phi3.FAMILY,
    smollm3.FAMILY,
    olmo2.FAMILY,
    granite.FAMILY,
    bert.FAMILY,
)
_BY_CLASS = {name: family for family in _FAMILIES for name in family.classes}


def family_of(architecture: str) -> Family:
    """The family of a Hugging Face class. Raises UnsupportedError, which lists the supported ones."""
    if architecture not in _BY_CLASS:
        raise UnsupportedError(
            f"{architecture} cannot be written as GGUF by this tool alone; it writes {', '.join(sorted(_BY_CLASS))}.\n"
            "For any other that llama.cpp knows:  --base-gguf FILE,  made by its convert_hf_to_gguf.py"
        )
    return _BY_CLASS[architecture]


__all__ = ["Change", "Family", "family_of"]
