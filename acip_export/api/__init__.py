"""The chain of stages. What the command line does, as plain functions."""

from acip_export.api.export import convert_bundle, export_model, export_once, materialize_bundle, shared_work
from acip_export.api.opening import open_model, open_scores
from acip_export.api.plan import Known, plan_export, planned_sizes, planning_problem, sweep_document, sweep_sizes
from acip_export.api.push import Publication, publication, push_export
from acip_export.api.rank import ranking_summary, write_imatrix
from acip_export.api.report import ranked_model_of, write_report
from acip_export.api.rounding_errors import measure_rounding_errors, rounding_errors, rounding_estimate
from acip_export.api.text import check_measurable, evaluation_text, text_to_measure
from acip_export.api.verify import verify_directory
from acip_export.report import write_comparison
from acip_export.verification.harness import task_origin

__all__ = [
    "Known",
    "Publication",
    "check_measurable",
    "convert_bundle",
    "evaluation_text",
    "export_model",
    "export_once",
    "materialize_bundle",
    "measure_rounding_errors",
    "open_model",
    "open_scores",
    "plan_export",
    "planned_sizes",
    "planning_problem",
    "publication",
    "push_export",
    "ranked_model_of",
    "ranking_summary",
    "rounding_errors",
    "rounding_estimate",
    "shared_work",
    "sweep_document",
    "sweep_sizes",
    "task_origin",
    "text_to_measure",
    "verify_directory",
    "write_comparison",
    "write_imatrix",
    "write_report",
]
