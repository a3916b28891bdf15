"""Count the memory that the linear algebra of one layer takes: as much as lowrank/ has in use at a time.

In matrices of float64, for a layer (out, in). Where one of these functions changes what it holds, so do these counts:
tests/ranking/test_layer_memory.py measures both.
"""

from __future__ import annotations

from acip_export.lowrank.moments import is_projected

Shape = tuple[int, int]

# What packing a moment of n columns holds beside it, in n x n matrices.
_PACKED_AT_ONCE = 3
# An eigendecomposition: Gram matrix, vectors, what LAPACK works in, and the vectors in another order.
_EIGEN = 5


def packing_bytes(columns: int) -> int:
    """Return what :func:`acip_export.lowrank.moments.pack_moment` takes."""
    return 8 * _PACKED_AT_ONCE * columns * columns


def gradient_packing_bytes(shape: Shape) -> int:
    """Return what :func:`acip_export.lowrank.moments.pack_gradients` takes."""
    out, inputs = shape
    if not is_projected(shape):
        return packing_bytes(out)
    # The moment is float32; matrices like the weight are there while its columns are made orthogonal.
    projecting = out * out / 2 + 2.5 * out * inputs + 2 * inputs * inputs
    return max(packing_bytes(inputs), int(8 * max(projecting, 3 * out * out / 2)))


def components_bytes(shape: Shape) -> int:
    """Return what whitening and decomposing a layer in the basis of both moments takes."""
    out, inputs = shape
    weight, of_inputs, of_outputs, small = out * inputs, inputs * inputs, out * out, min(shape) ** 2
    if is_projected(shape):
        # The projection's basis is as large as the weight, and its root as large as that of the inputs.
        held = weight + 2 * of_inputs
        whitening = held + 4 * weight + of_inputs
        root = held + weight + 3 * of_inputs
        held += 2 * of_inputs
        undone = held + 3.0 * weight + small
    else:
        # A root is made of three matrices, of which two stay.
        held = 2 * of_outputs
        whitening = held + weight + of_outputs
        root = held + weight + 3 * of_inputs
        held += 2 * of_inputs
        undone = held + 2.5 * weight + 1.5 * small
    decomposed = held + max(weight + _EIGEN * small, 2 * weight + 2 * small)
    return int(8 * max(whitening, root, decomposed, undone))


def factors_bytes(shape: Shape, entry: int) -> int:
    """Return the size of a layer's pair of factors, ``entry`` bytes a number."""
    return entry * min(shape) * sum(shape)
