"""A quantized base with a low-rank correction: ``weight`` is about ``base + up @ down``, all three rounded.

The pair starts as the best low-rank part of what rounding the weight costs (LQER, arXiv 2402.02446; QERA, arXiv
2410.06040), here in the norm of the predicted loss. Then base and pair are fitted to each other in turn (LoftQ, arXiv
2310.08659): the base is rounded again with the rounded pair taken away. The best of all rounds is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from acip_export.lowrank.components import whitened_components
from acip_export.lowrank.whitening import Whitening
from acip_export.materialization.factors import Norm, Pair
from acip_export.materialization.refit import refit
from acip_export.rounding.quantizer import InputMoments, RoundTrip
from acip_export.weight_types import WeightType

# benchmarks/refit.json: the second round gains a few percent on low-bit bases, further ones next to nothing.
_ROUNDS = 2


@dataclass(frozen=True)
class Corrected:
    """What the three quantizers are given.

    Attributes:
        base: (out, in) float32. pair, up_importance: as :class:`~acip_export.materialization.refit.Refitted`.
        loss: predicted loss of the rounded sum against the weight.
    """

    base: Tensor
    pair: Pair
    up_importance: Tensor
    loss: float


def correct(
    weight: Tensor,
    norm: Norm,
    whitenings: tuple[Whitening, Whitening],
    inputs: InputMoments,
    base_type: WeightType,
    rank: int,
    pair_formats: tuple[WeightType, WeightType],
    round_trip: RoundTrip,
) -> Corrected:
    """Fit base and pair.

    Args:
        weight: (out, in) float32. whitenings: of ``norm``'s inputs and gradients. inputs: what base and ``down``
            are rounded with. pair_formats: of (up, down).

    Raises:
        As ``round_trip``.
    """
    base = weight
    best: Corrected | None = None
    for _ in range(_ROUNDS):
        rounded = round_trip(base, base_type.name, inputs)
        missing = whitened_components(weight - rounded, *whitenings)
        pair = Pair(missing.up[:, :rank].contiguous(), missing.down[:rank].contiguous())
        fitted = refit(pair, norm, inputs, *pair_formats, round_trip)
        down = round_trip(fitted.pair.down, pair_formats[1].name, inputs)
        product = round_trip(fitted.pair.up, pair_formats[0].name, InputMoments(fitted.up_importance)) @ down
        loss = norm.loss(weight - rounded - product)
        if best is None or loss < best.loss:
            best = Corrected(base, fitted.pair, fitted.up_importance, loss)
        base = weight - product
    assert best is not None
    return best
