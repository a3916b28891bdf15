"""Measure what changed weights lose, matrix by matrix or by forward passes of the model: no file is written."""
