"""Materialized model in, export out: one sub-package per format."""
