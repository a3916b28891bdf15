"""Predict what dropping or rounding costs, to second order, from the moments of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from acip_export.lowrank.components import Components


@dataclass(frozen=True)
class ComponentLosses:
    """Hold the predictions for one module's components: see :class:`acip_export.artifacts.scores.ModuleScores`."""

    drop: Tensor
    up_sensitivity: Tensor
    down_sensitivity: Tensor


def component_losses(basis: Components, inputs: Tensor, gradients: Tensor) -> ComponentLosses:
    """Predict losses in any basis, (k,) float64 each, in nats per token.

    Dropping component k changes W by -up_k down_k^T: 1/2 (up_k^T G up_k)(down_k^T H down_k), which is half the squared
    singular value in the ``kfac`` basis. Rounding with a relative mean square error of one adds independent noise of
    variance up_ik^2 (or down_kj^2) to each entry, so that only the diagonal of G (or H) stays.
    """
    up, down = basis.up.double(), basis.down.double()
    up_energy = ((gradients @ up) * up).sum(0)
    down_energy = ((down @ inputs) * down).sum(1)
    return losses_of_energies(basis, (up_energy, down_energy), (inputs.diagonal(), gradients.diagonal()))


def losses_of_energies(
    basis: Components, energies: tuple[Tensor, Tensor], diagonals: tuple[Tensor, Tensor], rounding: float = 1.0
) -> ComponentLosses:
    """Predict as :func:`component_losses`.

    Args:
        energies: up_k^T G up_k and down_k^T H down_k, (k,) each. diagonals: of H and G.
        rounding: corrects what rounding costs by what was measured on the whole weight.
    """
    up_energy, down_energy = energies
    inputs, gradients = diagonals
    up, down = basis.up.double(), basis.down.double()
    return ComponentLosses(
        drop=0.5 * up_energy * down_energy,
        up_sensitivity=0.5 * rounding * (gradients @ up.square()) * down_energy,
        down_sensitivity=0.5 * rounding * up_energy * (down.square() @ inputs),
    )


def dense_sensitivity(weight: Tensor, inputs: Tensor, gradients: Tensor) -> float:
    """Predict the same for rounding the dense weight (out, in), from the diagonals: 1/2 sum_ij G_ii H_jj W_ij^2."""
    return 0.5 * float(gradients @ weight.double().square() @ inputs)
