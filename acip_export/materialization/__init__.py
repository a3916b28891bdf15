"""Plan and scores in, bundle out."""

from acip_export.materialization.bundle_writer import materialize_bundle

__all__ = ["materialize_bundle"]
