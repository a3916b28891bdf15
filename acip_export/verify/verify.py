"""Proof that an export is what its plan promised: bytes, then numbers, in the real runtimes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from acip_export.anatomy.read import PAPERS
from acip_export.bundle import Bundle
from acip_export.encoder import encoder_of
from acip_export.errors import VerificationError
from acip_export.plans import Plan, load_plan
from acip_export.verify.encoders import EncoderFigures, verify_encoder
from acip_export.verify.measure import Agreement, Perplexity, compare_logits, perplexity
from acip_export.verify.runtime import RuntimeSession, Speed, Windows

REPORT_VERSION = 1
REPORT_FILE = "report.json"
EXPORT_PLAN_FILE = "plan.json"

# Sampled by the reference itself: real text for the model, with no need for the user's.
_SAMPLED_WINDOWS, _SAMPLED_TOKENS, _GREEDY_TOKENS = 2, 48, 16
_FLOAT_TOLERANCE = {"onnx": 1e-4, "gguf": 2e-2}
# Sixty times what the rounding costs on a trained model, a thousandth of what four-bit weights do.
_ROUNDED_CACHE_KL = 1e-5
# Thirty times what was measured on trained models in both formats; a tensor in the wrong place costs whole nats.
_ROUNDED_ACTIVATIONS_KL = 0.03

# target -> runtimes, as module and class; the first one measures perplexity and speed.
_SESSIONS = {
    "gguf": (("acip_export.verify.llama_cpp", "LlamaCppSession"),),
    "onnx": (
        ("acip_export.verify.onnxruntime", "OnnxRuntimeSession"),
        ("acip_export.verify.genai", "GenaiSession"),
    ),
}


@dataclass(frozen=True)
class RuntimeReport:
    """One runtime's figures. ``perplexity`` only where text was given."""

    runtime: str
    agreement: Agreement
    perplexity: Perplexity | None
    speed: Speed | None


@dataclass(frozen=True)
class Report:
    """What ``report.json`` holds.

    Attributes:
        passed: every check held. failures: one sentence for each that did not.
        written_bytes, planned_bytes: of all files of the export.
        bundle_perplexity, dense_perplexity: in PyTorch, on the same text.
        similarity: encoders: mean cosine similarity of the export's embeddings to the dense model's.
        similarity_spearman, similarity_error: of the similarities between texts, against the dense model's.
    """

    export: str
    target: str
    layout: str
    budget_bytes: int
    budget_scope: str
    planned_bytes: int
    written_bytes: int
    memory_bytes: int
    passed: bool
    failures: tuple[str, ...]
    runtimes: tuple[RuntimeReport, ...]
    bundle_perplexity: Perplexity | None
    dense_perplexity: Perplexity | None
    similarity: float | None = None
    similarity_spearman: float | None = None
    similarity_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"format": "acip-report", "version": REPORT_VERSION, **dataclasses.asdict(self)}


def written_files(export: Path, plan: Plan) -> dict[str, int]:
    """Bytes on disk of the plan's files; a missing one is absent."""
    return {name: (export / name).stat().st_size for name in plan.files if (export / name).is_file()}


def check_bytes(export: Path, plan: Plan) -> list[str]:
    """One sentence per file that is not as planned."""
    written = written_files(export, plan)
    failures = [
        f"{name}: {written.get(name, 'no')} bytes written, {planned} planned"
        for name, planned in plan.files.items()
        if written.get(name) != planned
    ]
    unplanned = {str(f.relative_to(export)) for f in export.rglob("*") if f.is_file()} - set(plan.files) - PAPERS
    return failures + [f"{name}: written, but not planned" for name in sorted(unplanned)]


def verify_export(
    export: Path,
    bundle: Path,
    text: Windows | None = None,
    dense: Perplexity | None = None,
    measure_speed: bool = False,
    base: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Check bytes, then open the export in every runtime of its target and compare with the bundle.

    Args:
        text: token windows for perplexity. dense: the base model's on the same text (:func:`dense_perplexity`).
        base: the base model's directory, for the similarities that an encoder keeps.

    Raises:
        PlanFileError, BundleError: the export has no readable plan, or the bundle is damaged.
        MissingExtraError: a runtime is not installed.
    """
    from acip_export.verify.reference import TorchReference
    from converters.registry import converter

    plan = load_plan(export / EXPORT_PLAN_FILE)
    failures = check_bytes(export, plan)
    encoder = encoder_of(Bundle.open(bundle).as_checkpoint())
    if encoder is not None:
        figures = None
        if not failures:
            progress("encoder")
            figures = verify_encoder(export, plan, encoder, bundle, converter(plan.target).round_trip, base, text)
        return _encoder_report(export, plan, failures, figures)
    reference = TorchReference(bundle, converter(plan.target).round_trip)
    sampled = reference.sample(_SAMPLED_WINDOWS, min(_SAMPLED_TOKENS, plan.runtime.context), seed=0)
    prompt = [int(token) for token in sampled[0][: max(1, sampled.shape[1] // 3)]]
    continuation = reference.greedy(prompt, min(_GREEDY_TOKENS, plan.runtime.context - len(prompt)))
    reports: list[RuntimeReport] = []
    for index, (module, class_name) in enumerate(_SESSIONS[plan.target] if not failures else ()):
        session: RuntimeSession
        with getattr(import_module(module), class_name)(export, plan.runtime) as session:
            progress(session.name)
            agreement = compare_logits(
                reference.logits(sampled),
                session.logits(sampled),
                (continuation, session.greedy(prompt, len(continuation))),
            )
            first = index == 0
            reports.append(
                RuntimeReport(
                    session.name,
                    agreement,
                    perplexity(session.logits(text), text) if first and text is not None else None,
                    session.speed(min(128, plan.runtime.context // 2), 32) if measure_speed else None,
                )
            )
        failures += _check_agreement(plan, reports[-1])
    return Report(
        export=export.name,
        target=plan.target,
        layout=plan.layout,
        budget_bytes=plan.budget_bytes,
        budget_scope=plan.budget_scope,
        planned_bytes=plan.planned_bytes,
        written_bytes=sum(written_files(export, plan).values()),
        memory_bytes=plan.memory_bytes,
        passed=not failures,
        failures=tuple(failures),
        runtimes=tuple(reports),
        bundle_perplexity=None if text is None else perplexity(reference.logits(text), text),
        dense_perplexity=dense,
    )


def _encoder_report(export: Path, plan: Plan, failures: list[str], figures: EncoderFigures | None) -> Report:
    failures = failures + list(figures.failures if figures else ())
    kept = None if figures is None else figures.similarity
    return Report(
        export=export.name,
        target=plan.target,
        layout=plan.layout,
        budget_bytes=plan.budget_bytes,
        budget_scope=plan.budget_scope,
        planned_bytes=plan.planned_bytes,
        written_bytes=sum(written_files(export, plan).values()),
        memory_bytes=plan.memory_bytes,
        passed=not failures,
        failures=tuple(failures),
        runtimes=(RuntimeReport(figures.runtime, figures.agreement, None, None),) if figures else (),
        bundle_perplexity=None,
        dense_perplexity=None,
        similarity=None if kept is None else 1 - kept.mean_distance,
        similarity_spearman=None if kept is None else kept.spearman,
        similarity_error=None if kept is None else kept.mean_error,
    )


def dense_perplexity(model: Path, text: Windows) -> Perplexity:
    """Of a Hugging Face model directory, in PyTorch; the same for every export of it."""
    from acip_export.verify.reference import TorchReference

    return perplexity(TorchReference(model).logits(text), text)


def _is_float(plan: Plan) -> bool:
    used = {name for d in plan.tensors for name in (d.format, d.up_format, d.down_format) if name}
    return used <= {"f32", "q1_0"} if plan.layout == "adapter" else used <= {"f32"}


def _check_agreement(plan: Plan, report: RuntimeReport) -> list[str]:
    """Float exports must equal the bundle; rounded ones must not be further off than rounding can take them."""
    agreement = report.agreement
    failures = []
    if _is_float(plan):
        tolerance = _FLOAT_TOLERANCE[plan.target]
        # llama.cpp's attention rounds K and V to float16: large logits move further, and mean as little as small ones.
        rounded_cache = plan.target == "gguf" and agreement.mean_kl <= _ROUNDED_CACHE_KL
        if not (agreement.max_logit_difference <= tolerance or rounded_cache):
            failures.append(
                f"{report.runtime}: logits differ by {agreement.max_logit_difference:.2e}, at most {tolerance} allowed"
            )
        if agreement.greedy_equal != agreement.greedy_tokens:
            failures.append(f"{report.runtime}: greedy tokens differ after {agreement.greedy_equal}")
    else:
        # The bundle is rounded alike, so what is left is the runtime's rounding of activations to eight bits.
        if not agreement.mean_kl <= _ROUNDED_ACTIVATIONS_KL:
            failures.append(
                f"{report.runtime}: KL from the bundle is {agreement.mean_kl:.3f} nats per token, at most "
                f"{_ROUNDED_ACTIVATIONS_KL}"
            )
    return failures


def save_report(report: Report, export: Path) -> None:
    (export / REPORT_FILE).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")


def require_passed(report: Report) -> None:
    """Raises VerificationError with every failure."""
    if not report.passed:
        lines = "\n".join(f"  {failure}" for failure in report.failures)
        raise VerificationError(f"{report.export} is not what was planned:\n{lines}")
