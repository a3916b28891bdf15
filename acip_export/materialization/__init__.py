"""Checkpoint, scores and plan in, the tensors of an export out: one at a time, or as a bundle."""

from acip_export.materialization.bundle_writer import materialize_bundle
from acip_export.materialization.planned_model import PlannedModel

__all__ = ["PlannedModel", "materialize_bundle"]
