"""Plan and scores in, bundle out."""

from acip_export.materialize.stream import MaterializeProgress, materialize_bundle

__all__ = ["MaterializeProgress", "materialize_bundle"]
