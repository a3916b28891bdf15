"""Check the release of onnxruntime-genai: the adapter knows the model builder of one. Planning imports this, too."""

from __future__ import annotations

from importlib.metadata import version

from acip_export.errors import UnsupportedError

SUPPORTED_RELEASE = "0.18"


def check_release() -> None:
    """Refuse any release of onnxruntime-genai but the one that the adapter was written for.

    Raises:
        UnsupportedError: another release is installed.
    """
    installed = version("onnxruntime-genai")
    if not installed.startswith(f"{SUPPORTED_RELEASE}."):
        raise UnsupportedError(
            f"onnxruntime-genai {installed} is installed, the ONNX converter needs {SUPPORTED_RELEASE}.*: its model "
            "builder has no stable interface.\n"
            f"Install it with:  pip install 'onnxruntime-genai=={SUPPORTED_RELEASE}.*'"
        )
