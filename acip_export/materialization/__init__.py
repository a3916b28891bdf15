"""Plan and scores in, bundle out."""

from acip_export.materialization.bundle_writer import MaterializeProgress, materialize_bundle

__all__ = ["MaterializeProgress", "materialize_bundle"]
