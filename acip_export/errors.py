"""Every error that acip-export raises on purpose.

    AcipError                      exit code
    ├── UsageError                 2   flags that contradict each other, a bare-number budget, existing output
    │   └── OutputError                what was asked for cannot be written where it was asked for: a full disk
    │       └── HubError                   on a Hugging Face hub: no token, no permission, no network
    ├── InputError                 3   a file that is missing, damaged, hostile or of another model
    │   ├── CheckpointError            the model directory
    │   ├── ScoreFileError             *.acip
    │   ├── PlanFileError              plan.json
    │   ├── BundleError                the materialized model
    │   ├── TunedFileError             tuned.safetensors of an export that was tuned
    │   ├── DataError                  calibration or evaluation text
    │   ├── RankingError               model and text together: the ranking run diverged, or cannot be resumed
    │   ├── DeviceFileError            a user's devices.toml
    │   ├── ModelFileError             any .gguf, .onnx, .safetensors, or a directory of them
    │   ├── ImatrixError               llama.cpp's importance matrix
    │   ├── ExtensionError             the llama.cpp checkout that our extension goes into
    │   └── BaselineError              acip-check.lock.json, or what --against names
    ├── InfeasibleBudgetError      4   no plan fits; the message names the smallest feasible budget
    ├── UnacceptedLossError        4   the plan that fits is far off the dense model; the message names what is not
    ├── UnreachableSpeedError      4   no plan is as fast as was asked for; the message names the fastest
    ├── UnsupportedError           5   the format cannot express what was asked
    ├── VerificationError          6   the export is not what was promised
    │   ├── RuntimeCrashError          its runtime died: the message has the signal and the end of its output
    │   └── RuntimeHangError           its runtime gave no answer in time
    └── MissingExtraError          7   an optional dependency; the message gives the pip command

Anything else is a bug and exits with 1. Each message says what was found, what was expected and what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class AcipError(Exception):
    """Base class. ``exit_code`` is what the command line exits with."""

    exit_code: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints: the message, the exit code, the class, and what it knows beyond them."""
        return {"error": str(self), "code": self.exit_code, "kind": type(self).__name__}


class UsageError(AcipError):
    exit_code = 2


class OutputError(UsageError):
    """The place for the output cannot be written to, or has no room. Nothing is left there."""


class HubError(OutputError):
    """A hub refuses what is to be uploaded, or cannot be reached. Nothing was committed."""


class InputError(AcipError):
    exit_code = 3


class CheckpointError(InputError):
    """The model directory cannot be read as a Hugging Face model."""


class ScoreFileError(InputError):
    """The score file is damaged, of an unknown version, or of another model."""


class PlanFileError(InputError):
    """The plan is damaged, of an unknown version, or does not fit its model."""


class BundleError(InputError):
    """The bundle is damaged, of an unknown version, or does not fit its plan."""


class TunedFileError(InputError):
    """The tuned numbers of an export are missing, damaged, of an unknown version, or of another plan."""


class DataError(InputError):
    """The calibration or evaluation text cannot be used."""


class RankingError(InputError):
    """The ranking run diverged, or there is no run state to resume."""


class DeviceFileError(InputError):
    """A file with devices is missing or malformed."""


class SpeedsVersionError(DeviceFileError):
    """The table of speeds was written by another version of this tool; it may be whole."""


class ModelFileError(InputError):
    """A model file or directory to be looked at is missing, damaged, truncated or hostile."""


class ImatrixError(InputError):
    """The file given as an importance matrix is missing, damaged, none, or of another model."""


class ExtensionError(InputError):
    """The directory is no llama.cpp checkout, or of a version in which our extension does not find its places."""


class BaselineError(InputError):
    """The baseline of a check is damaged, of an unknown version, or does not have what is compared."""


class BaselineVersionError(BaselineError):
    """The baseline was written by another version, which may have known more."""


class InfeasibleBudgetError(AcipError):
    """No plan fits the budget.

    Attributes:
        smallest_feasible_bytes: the smallest budget for which a plan exists with the same options.
        alternatives: settings for which the budget was found to be enough: ``change`` is what to type, ``floor_bytes``
            the smallest budget with it.
    """

    exit_code = 4

    def __init__(
        self, message: str, smallest_feasible_bytes: int, alternatives: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        super().__init__(message)
        self.smallest_feasible_bytes = smallest_feasible_bytes
        self.alternatives = tuple(alternatives)

    def to_json(self) -> dict[str, Any]:
        return {
            **super().to_json(),
            "floor_bytes": self.smallest_feasible_bytes,
            "alternatives": [dict(each) for each in self.alternatives],
        }


class UnacceptedLossError(AcipError):
    """A plan fits the budget, but is predicted to be far off the dense model, and nobody said that it may be.

    ``alternatives`` are settings that are predicted to keep more: ``change`` is what to type.
    """

    exit_code = 4

    def __init__(self, message: str, alternatives: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.alternatives = tuple(alternatives)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "alternatives": [dict(each) for each in self.alternatives]}


class UnreachableSpeedError(AcipError):
    """No plan is as fast as was asked for. ``fastest``: tokens a second of the one that is; ``None``: not known."""

    exit_code = 4

    def __init__(self, message: str, fastest: float | None) -> None:
        super().__init__(message)
        self.fastest = fastest

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "fastest": self.fastest}


class UnsupportedError(AcipError):
    exit_code = 5


class VerificationError(AcipError):
    exit_code = 6


class RuntimeCrashError(VerificationError):
    """The process that ran the export ended by a signal, or without a result."""


class RuntimeHangError(VerificationError):
    """The process that ran the export did not end in time and was killed."""


class MissingExtraError(AcipError):
    """An optional dependency is not installed. ``command`` installs it, if pip and ``extra`` do not."""

    exit_code = 7

    def __init__(self, package: str, extra: str, purpose: str, command: str | None = None) -> None:
        self.fields = (package, extra, purpose, command)
        command = command or f"pip install 'acip-export[{extra}]'"
        super().__init__(f"{package} is not installed, and {purpose} needs it.\nInstall it with:  {command}")
