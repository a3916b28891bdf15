"""The size and quality gate for continuous integration. Imports neither torch nor numpy. See docs/check.md."""
