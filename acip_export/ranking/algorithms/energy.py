"""Rank by the singular values of W H^(1/2): the energy of a layer's output that dropping a component loses."""

from __future__ import annotations

from acip_export.ranking.algorithm import Algorithm
from acip_export.ranking.algorithms.magnitude import score

ALGORITHM = Algorithm(
    "energy",
    "The singular values of the weights on whitened inputs: the output energy that is lost.",
    "input",
    score,
    source="SVD-LLM, arXiv 2403.07378",
)
