"""The release of onnxruntime-genai whose model builder the adapter knows; light, so that plans can ask too."""

from __future__ import annotations

from importlib.metadata import version

from acip_export.errors import UnsupportedError

SUPPORTED_VERSION = "0.18."


def check_release() -> None:
    """Raises UnsupportedError unless the installed release is the one that the adapter was written against."""
    found = version("onnxruntime-genai")
    if not found.startswith(SUPPORTED_VERSION):
        raise UnsupportedError(
            f"onnxruntime-genai {found} is installed, the ONNX converter needs {SUPPORTED_VERSION}*: its model builder "
            f"has no stable interface.\nInstall it with:  pip install 'onnxruntime-genai=={SUPPORTED_VERSION}*'"
        )
