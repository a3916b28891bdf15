"""Bundle in, export out: one sub-package per format."""
