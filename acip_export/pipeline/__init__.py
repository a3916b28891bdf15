"""The chain of stages. What the command line does, as plain functions."""

from acip_export.pipeline.exporting import convert_bundle, export_model, materialize_bundle
from acip_export.pipeline.planning import plan_export, planned_sizes, planning_problem, sweep_document, sweep_sizes
from acip_export.pipeline.progress import ProgressCallback, StageProgress, quiet
from acip_export.pipeline.ranking import open_scores, rank_to_file, ranking_summary, write_imatrix
from acip_export.pipeline.reporting import ranked_model_of, write_report
from acip_export.pipeline.rounding import measure_rounding_errors, rounding_errors
from acip_export.pipeline.verifying import evaluation_text, verify_directory

__all__ = [
    "ProgressCallback",
    "StageProgress",
    "convert_bundle",
    "evaluation_text",
    "export_model",
    "materialize_bundle",
    "measure_rounding_errors",
    "open_scores",
    "plan_export",
    "planned_sizes",
    "planning_problem",
    "quiet",
    "rank_to_file",
    "ranked_model_of",
    "ranking_summary",
    "rounding_errors",
    "sweep_document",
    "sweep_sizes",
    "verify_directory",
    "write_imatrix",
    "write_report",
]
