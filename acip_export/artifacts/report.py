"""``report.json``: what verification found in an export. See docs/report.md.

Every figure is a finite number. One that could not be measured is ``None``, and so is the record of figures that are
none: of a runtime, say, whose logits are NaN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from acip_export.artifacts.document import Artifact, read_artifact
from acip_export.artifacts.export_directory import claim_papers
from acip_export.artifacts.names import REPORT, REPORT_FILE, ArtifactName
from acip_export.artifacts.plan import BudgetScope, Name
from acip_export.errors import InputError
from acip_export.io.inputs import Count, Finite, NotNegative, PositiveFloat, Share
from acip_export.model.task import LOSS_UNITS, Task


@dataclass(frozen=True)
class Agreement:
    """How close two models are on the same tokens.

    Attributes:
        max_logit_difference: after removing each position's mean, which no probability depends on.
        mean_kl: KL(reference || other), nats per token. same_top: share of positions with the same most likely token.
        greedy_equal: leading tokens of a greedy continuation that agree, ``greedy_tokens`` of them compared.
    """

    positions: Count
    max_logit_difference: Finite
    mean_kl: Finite
    same_top: Share
    greedy_equal: Count
    greedy_tokens: Count


@dataclass(frozen=True)
class Perplexity:
    """Teacher-forced, non-overlapping windows, whose first tokens are context only.

    Attributes:
        standard_error: of ``mean_loss``, over tokens, taken as independent. tokens: that were predicted.
    """

    perplexity: PositiveFloat
    mean_loss: Finite
    standard_error: NotNegative
    tokens: Count


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the dense one, position by position on the same text; nats per token.

    Attributes:
        mean_kl: KL(dense || export). loss_difference: export's minus dense model's. Standard errors are over tokens,
            taken as independent; the difference is paired, so its error is far below that of either loss.
        kl_999: the 99.9 % quantile of KL over positions: how bad the worst of a thousand are.
        same_top: share of positions with the same most likely token.
    """

    mean_kl: Finite
    kl_standard_error: NotNegative
    kl_999: Finite
    loss_difference: Finite
    loss_difference_standard_error: NotNegative
    same_top: Share
    tokens: Count


@dataclass(frozen=True)
class Memory:
    """Resident memory of the process, in bytes.

    Attributes:
        peak_bytes: above the interpreter's.
        anonymous_bytes, file_bytes: at the end, allocated and mapped from files; the interpreter's included.
        interpreter_bytes, interpreter_anonymous_bytes: resident, and allocated, before the runtime's library was
            loaded.
    """

    peak_bytes: Count
    anonymous_bytes: Count
    file_bytes: Count
    interpreter_bytes: Count
    interpreter_anonymous_bytes: Count

    @property
    def allocated_bytes(self) -> int:
        """Anonymous memory beyond the interpreter's: what the system could not drop."""
        return max(0, self.anonymous_bytes - self.interpreter_anonymous_bytes)


@dataclass(frozen=True)
class MemoryReport(Memory):
    """A process against the plan.

    Attributes:
        predicted_bytes: the plan's, this runtime itself included. predicted_anonymous_bytes: of that, what the system
            cannot drop.
        within_budget: the peak without what the budget does not cover, or what could not be dropped at the end;
            ``None`` for budgets of files, and for graphs that are meant for another processor than the one that was
            measured.
    """

    predicted_bytes: Count
    predicted_anonymous_bytes: Count
    within_budget: bool | None


@dataclass(frozen=True)
class Speed:
    """Tokens per second on this machine: of a prompt of ``prompt_tokens``, then of ``new_tokens`` one by one.

    Encoders generate nothing: their ``decode`` is ``None``, and ``prompt_tokens`` are those of texts of full length.
    """

    prefill: NotNegative
    decode: NotNegative | None
    prompt_tokens: Count
    new_tokens: Count


@dataclass(frozen=True)
class TokenDifference:
    """A string that a runtime cuts into other tokens than transformers."""

    text: str
    expected: tuple[Count, ...]
    found: tuple[Count, ...]


@dataclass(frozen=True)
class Tokens:
    """How a runtime's tokenizer compares with transformers' on ``texts`` strings; ``different``: all that differ."""

    texts: Count
    different: tuple[TokenDifference, ...]


@dataclass(frozen=True)
class RuntimeReport:
    """One runtime's figures. ``perplexity`` and ``divergence`` only where text was given, of the first runtime.

    Attributes:
        tokens: ``None`` where the runtime reads token ids, and of encoders.
    """

    runtime: str
    load_seconds: NotNegative | None
    agreement: Agreement | None
    perplexity: Perplexity | None
    divergence: Divergence | None
    memory: MemoryReport | None
    speed: Speed | None
    tokens: Tokens | None = None


@dataclass(frozen=True)
class FileReport:
    """A file of the export; ``sha256`` and ``bytes`` are ``None`` when it is missing."""

    name: Name
    bytes: Count | None
    planned_bytes: Count
    sha256: str | None


@dataclass(frozen=True)
class TextReport:
    """The text that quality was measured on; ``tokens``: in all windows together."""

    source: str
    sha256: str
    windows: Count
    window_tokens: Count
    tokens: Count


@dataclass(frozen=True)
class Structure:
    """``tensors`` that the plan's decisions ask for; ``found``: those that are there as planned."""

    tensors: Count
    found: Count


@dataclass(frozen=True)
class Provenance:
    """What the export was made of and by."""

    tool: str
    model_fingerprint: str
    scores_sha256: str


@dataclass(frozen=True)
class TaskMetric:
    """A result of lm-evaluation-harness; ``standard_error`` is ``None`` where the harness gives none."""

    value: Finite
    standard_error: Finite | None


@dataclass(frozen=True)
class Report(Artifact):
    """What ``report.json`` holds; docs/report.md says what each figure is.

    Attributes:
        passed: every check held. failures: one sentence for each that did not. notes: what could not be measured.
        written_bytes, planned_bytes: of all files of the export.
        dense_perplexity: in PyTorch, on the same text. bundle_perplexity: on what agreement was measured on.
        similarity: encoders: mean cosine similarity of the export's embeddings to the dense model's.
        similarity_spearman, similarity_error: of the similarities between texts, against the dense model's.
        tasks: task -> metric -> value and standard error.
    """

    NAME: ClassVar[ArtifactName] = REPORT

    export: str
    model: Name
    format: Name
    layout: Name
    task: Task
    budget_bytes: Count
    budget_scope: BudgetScope
    planned_bytes: Count
    written_bytes: Count
    memory_bytes: Count
    process_bytes: Count
    breakdown: Mapping[str, Count]
    predicted_loss: Finite
    predicted_perplexity: PositiveFloat | None
    passed: bool
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[FileReport, ...]
    structure: Structure | None
    provenance: Provenance
    machine: Mapping[str, str | int | None]
    versions: Mapping[str, str]
    text: TextReport | None
    runtimes: tuple[RuntimeReport, ...]
    bundle_perplexity: Perplexity | None
    dense_perplexity: Perplexity | None
    similarity: Finite | None = None
    similarity_spearman: Finite | None = None
    similarity_error: Finite | None = None
    tasks: Mapping[str, Mapping[str, TaskMetric]] | None = None
    predicted_divergence: Finite | None = None

    @property
    def loss_unit(self) -> str:
        """What losses are counted in."""
        return LOSS_UNITS[self.task]

    @property
    def perplexity(self) -> tuple[RuntimeReport, Perplexity] | None:
        """The first runtime whose perplexity was measured, with it."""
        return next(((each, each.perplexity) for each in self.runtimes if each.perplexity is not None), None)


def load_report(file: Path | str) -> Report:
    """Read and check a report.

    Raises:
        InputError: unreadable, damaged or of another version.
    """
    return read_artifact(Path(file), Report, InputError, missing="; make it with  acip-export verify")


def find_report(model: Path) -> Path | None:
    """The report of an export directory, or of a model file that lies in one."""
    file = (model if model.is_dir() else model.parent) / REPORT_FILE
    return file if file.exists() else None


def save_report(report: Report, export: Path) -> None:
    """Write ``report.json`` into the export, in place of an earlier one of ours."""
    with claim_papers(export)[REPORT_FILE].new_file() as file:
        file.write_text(json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
