"""What quantization tools do by default: one type for everything. Problems with a single candidate per tensor."""

from __future__ import annotations

from acip_export.artifacts.plan import TensorDecision
from acip_export.planning.candidates import Candidates
from acip_export.planning.problem import Problem
from acip_export.weight_types import WeightType


def preset(problem: Problem, type_: WeightType) -> Problem:
    """Store every matrix dense in one type of the problem's search space.

    A tensor that cannot take it gets the smallest type that is at least as precise, or else the most precise one that
    it can, as with the tools that this stands for.
    """

    def width(option: TensorDecision) -> float:
        return problem.space.format.type(str(option.type)).bits_per_weight

    def chosen(candidates: Candidates) -> TensorDecision:
        dense = [option for option in candidates.options if option.rank is None]
        same = next((option for option in dense if option.type == type_.name), None)
        if same is not None:
            return same
        enough = [option for option in dense if width(option) >= type_.bits_per_weight]
        return min(enough, key=width) if enough else max(dense, key=width)

    picks = {id(candidates): chosen(candidates) for candidates in problem.candidates}
    return problem.only(lambda candidates, option: option is picks[id(candidates)])
