"""A model as a plan has it, before its matrices are rounded: what formats are written from and compared with.

A dense weight keeps its name (``M.weight``); a factor pair is ``M.up.weight`` (out, rank) and ``M.down.weight``
(rank, in), and stands for ``up @ down`` (plus ``M.weight``, where an adapter has a base that is not zero).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from acip_export.artifacts.plan import Plan, TensorDecision
from acip_export.errors import InputError, PlanFileError
from acip_export.model.checkpoint import Checkpoint
from acip_export.rounding.error_feedback import FeedbackFactor
from acip_export.rounding.kept_roundings import KeptRoundings
from acip_export.rounding.quantizer import InputMoments, RoundTrip

if TYPE_CHECKING:
    import torch
    from torch import nn


class MaterializedModel(ABC):
    """Tensors of a plan, one at a time. Holds no weights.

    Attributes:
        path: directory with the model's config and tokenizer.
        plan, config: the plan, and the model's ``config.json``.
        kept: where those who round its matrices keep what they made of them, for each other.
        ERROR: raised where the tensors do not fit the architecture.
    """

    ERROR: ClassVar[type[InputError]]

    def __init__(self, path: Path, plan: Plan, config: Mapping[str, Any], kept: KeptRoundings | None = None) -> None:
        self.path, self.plan, self.config, self.kept = path, plan, config, kept

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of its exports has to know, a sentence each."""
        return ()

    @property
    def made_of(self) -> str:
        """What tells its numbers apart from others of the same plan."""
        return ""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors that there are, by name."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Return one tensor: in the checkpoint's dtype where nothing changed it, else float32."""

    @abstractmethod
    def has_importance(self, name: str) -> bool:
        """Tell whether :meth:`importance` is known."""

    @abstractmethod
    def importance(self, name: str) -> torch.Tensor | None:
        """Return second moments of the inputs that meet a matrix's columns, (in,); ``None`` when not known."""

    @abstractmethod
    def feedback(self, name: str) -> FeedbackFactor | None:
        """Return how errors are carried in a matrix; ``None``: it is rounded to the nearest codes."""

    @abstractmethod
    def row_feedback(self, name: str) -> Sequence[FeedbackFactor] | None:
        """Return how errors are carried among the rows of a matrix; ``None``: they are independent."""

    def gains(self, name: str) -> torch.Tensor | None:  # noqa: ARG002 - for those that are tuned
        """Return what tuning multiplies the scales of a matrix with, (rows, blocks); ``None``: they stay."""
        return None

    def inputs(self, name: str) -> InputMoments:
        """Return what rounding may know of a stored matrix; raises as :meth:`feedback`."""
        return InputMoments(
            self.importance(name), self.feedback(name), self.kept, self.gains(name), self.row_feedback(name)
        )

    def as_checkpoint(self) -> Checkpoint:
        """Return config and tokenizer, through the interface that predictions use."""
        return Checkpoint(self.path, self.config, {}, self.plan.options)


def check_context(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raises PlanFileError for a context beyond the model's: a runtime would ask for the memory of all its tokens."""
    longest = checkpoint.shape.max_context
    if plan.serving.context > longest:
        raise PlanFileError(
            f"the plan's context is {plan.serving.context} tokens, {checkpoint.path} was made for {longest}; plan again"
        )


def stored_tensors(name: str, shape: tuple[int, ...], rank: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes under which a weight, or the factor pair in its place, is stored."""
    if rank is None:
        return {name: shape}
    module = name.removesuffix(".weight")
    return {f"{module}.up.weight": (shape[0], rank), f"{module}.down.weight": (rank, shape[1])}


def stored_of(decision: TensorDecision) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything that is stored of a decision."""
    base = {decision.name: decision.shape} if decision.representation == "residual" else {}
    return {**stored_tensors(decision.name, decision.shape, decision.rank), **base}


def stored_formats(decision: TensorDecision) -> dict[str, str]:
    """The weight format of each of :func:`stored_of`."""
    if decision.rank is None:
        return {decision.name: decision.type or ""}
    base = {decision.name: decision.type or ""} if decision.representation == "residual" else {}
    return base | {
        f"{decision.module}.up.weight": decision.up_type or "",
        f"{decision.module}.down.weight": decision.down_type or "",
    }


def load_materialized(model: MaterializedModel, round_trip: RoundTrip | None) -> nn.Module:
    """The whole model as a float32 module in evaluation mode.

    Args:
        round_trip: matrices then have the numbers that the export has. ``None``: those before rounding.

    Raises:
        BundleError, CheckpointError: it does not fit its architecture, or cannot be read.
    """
    module, types = untrained(model), stored_types(model.plan)
    state = {name: rounded_tensor(model, name, types, round_trip) for name in model.shapes}
    missing, unexpected = module.load_state_dict(state, strict=False)
    check_names(model, missing, unexpected)
    return module.eval()


def untrained(model: MaterializedModel) -> nn.Module:
    """A module of the model's architecture, with factor pairs where the plan has them; its numbers mean nothing."""
    from acip_export.model.torch_model import FactoredLinear, untrained_model, with_fixed_positions

    module = untrained_model(with_fixed_positions(model.config, model.plan.serving.context))
    for decision in model.plan.tensors:
        if decision.rank is None:
            continue
        parent, _, child = decision.module.rpartition(".")
        outputs, inputs = decision.shape
        dense = module.get_submodule(decision.module)
        factored = FactoredLinear(
            inputs,
            decision.rank,
            outputs,
            base=decision.name in model.shapes,
            bias=getattr(dense, "bias", None) is not None,
        )
        setattr(module.get_submodule(parent), child, factored)
    return module.eval()


def stored_types(plan: Plan) -> dict[str, str]:
    """The weight type of every tensor that is stored of ``plan``."""
    return {name: form for decision in plan.tensors for name, form in stored_formats(decision).items()}


def rounded_tensor(
    model: MaterializedModel,
    name: str,
    types: Mapping[str, str],
    round_trip: RoundTrip | None,
    rows: torch.Tensor | slice | None = None,
) -> torch.Tensor:
    """A tensor, float32, with the numbers that the export has.

    Args:
        types: as :func:`stored_types`. round_trip: as :func:`load_materialized`. rows: some only; ``None``: all.
    """
    tensor = model.read(name)
    tensor = (tensor if rows is None else tensor[rows]).float()
    if round_trip is None or tensor.ndim != 2 or name not in types:
        return tensor
    inputs = model.inputs(name)
    return round_trip(tensor, types[name], inputs if rows is None else inputs.of_rows(rows))


def check_names(model: MaterializedModel, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises the model's error for tensors that the architecture misses, or does not know."""
    from acip_export.model.torch_model import tied_names

    absent, strange = sorted(set(missing) - tied_names(model.as_checkpoint())), sorted(unexpected)
    if absent or strange:
        raise model.ERROR(f"{model.path} does not fit its architecture: missing {absent[:3]}, unexpected {strange[:3]}")
