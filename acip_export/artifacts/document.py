"""What all JSON artifacts have in common: they say what they are and of which version, and are read strictly."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from acip_export.artifacts.names import ArtifactName
from acip_export.errors import AcipError, InputError
from acip_export.io.inputs import Failure, ReadOnly, builtins, decode_json, decode_strictly, read_input, read_json


class Artifact(ReadOnly):
    """A JSON document of this tool, as a frozen dataclass: behind ``artifact`` and ``version``, fields are the keys.

    Attributes:
        NAME: what the document says that it is.
    """

    NAME: ClassVar[ArtifactName]

    def to_json(self) -> dict[str, Any]:
        """Return the document as ``json.dumps`` takes it."""
        return {"artifact": self.NAME.artifact, "version": self.NAME.version, **builtins(self)}


class Header(msgspec.Struct, frozen=True):
    """What a document says that it is; anything, as long as nobody has looked."""

    artifact: Any = None
    version: Any = None


_A = TypeVar("_A", bound=Artifact)


def header_of(data: bytes, where: str, error: Failure) -> Header:
    """Look at what a JSON object says that it is. Raises ``error`` if it is no JSON object."""
    return decode_json(data, Header, where, error)


def read_artifact(
    file: Path, kind: type[_A], error: Failure, missing: str = "", version_error: Failure | None = None
) -> _A:
    """Read a file. Raises ``error`` as :func:`acip_export.io.inputs.open_input` and :func:`decode_artifact`."""
    return decode_artifact(read_input(file, error, missing=missing), kind, str(file), error, version_error)


def decode_artifact(
    data: bytes, kind: type[_A], where: str, error: Failure, version_error: Failure | None = None
) -> _A:
    """Decode a document, its version first; ``where`` names its origin in messages.

    Raises:
        error: something else, or not as its schema says. version_error: of another version; by default ``error``.
    """

    def fail(message: str) -> AcipError:
        return error(f"{message}; {kind.NAME.remedy}")

    check_header(header_of(data, where, fail), kind.NAME, where, error, version_error)
    return decode_strictly(data, kind, where, fail, ("artifact", "version"))


class _Listing(msgspec.Struct, frozen=True):
    """A document that lists files with their bytes."""

    artifact: str
    files: dict[str, int]


def listed_files(file: Path, name: ArtifactName) -> dict[str, int]:
    """What a document says about the files beside it, in any version; empty where it is not ``name``."""
    try:
        listing = read_json(file, _Listing, InputError)
    except InputError:
        return {}
    return listing.files if listing.artifact == name.artifact else {}


def check_header(
    header: Header, name: ArtifactName, where: str, error: Failure, version_error: Failure | None = None
) -> None:
    """Raises ``error`` for something else than ``name``, ``version_error`` for another version."""
    if header.artifact != name.artifact:
        found = "nothing" if header.artifact is None else reprlib.repr(header.artifact)
        raise error(f"{where} is not {name.noun}: its key artifact is {found}, expected {name.artifact!r}")
    if header.version != name.version:
        raise (version_error or error)(
            f"{where} is {name.noun} of version {reprlib.repr(header.version)}, this tool reads {name.version}; "
            f"{name.remedy}"
        )
