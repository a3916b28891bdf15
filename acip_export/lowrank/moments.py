"""Pack second moments into a fifth of their float32 triangles, and make them again.

With H^-1 = U^T U and U upper triangular, columns in the order of H's diagonal, the largest first, a packed moment is
the diagonal of U, each row over its diagonal entry as whole multiples of a step, and the diagonal of H itself, which is
exact. Whatever the steps, what is made again is positive definite. docs/score-file.md has the format, docs/LOG.md what
it costs.

Output gradients of a layer with more outputs than inputs have a moment that outweighs it. Only what it says about
the columns of the weight counts for the layer's components: of these layers that is kept, see :func:`projected`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from acip_export.errors import ScoreFileError
from acip_export.finite import is_finite
from acip_export.lowrank.triangular import above_diagonal, add_one_, invert_upper_
from acip_export.rounding.error_feedback import FeedbackFactor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Floats = npt.NDArray[np.float32]

# Added to the diagonal before it is inverted, as shares of its mean. The first is used unless the moment has no factor
# even so: moments of few tokens may have negative eigenvalues.
_DAMPINGS = (3e-4, 3e-3, 3e-2, 0.3, 3.0)
# Error feedback wants more, as a share of the mean of the diagonal. What few tokens say about how inputs go together is
# chance: n inputs count as if n more tokens had been seen in which they do not go together.
_FEEDBACK_DAMPING = 0.01
# Up to so many inputs it is factorized again in the order that scaling gives it. In the order of before, errors are 2 %
# larger, which takes half of the time and memory: the difference is a minute for one matrix of 14,336 columns.
SORTED_COLUMNS = 8192
# Among rows, too: on a real model half of it or three times as much are worse (docs/LOG.md, errors from row to row).
_ROW_DAMPING = 1.0
# Scales that differ by more want float64: in float32 errors are 1 % larger at three decades.
_SCALED_APART = 100.0
# A row's step is this share of its root mean square, unless its largest entry needs a larger one.
_STEP = 1 / 16
_MOST = 127
# Added to a Gram matrix, as a share of each diagonal entry: dependent columns of a weight.
_DEPENDENT = 1e-10
# Outputs that never had a gradient count as if they had had this share of the mean: nothing is divided by zero.
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class PackedMoment:
    """Hold a second moment as the score file does.

    Attributes:
        diagonal: (n,) of the moment, exact.
        pivots: (n,) diagonal of U, in descending order of the diagonal that the moment was packed with.
        steps: (n,) of U's rows over their pivots.
        codes: (bytes,) the entries of these rows above the diagonal, row by row, in steps: signed bytes, deflated.
        order: (n,) the columns in descending order.
        scales: (n,) what the vectors' entries were multiplied by since; ``None``: nothing.
        tokens: that it was measured on, for error feedback; ``None``: more than enough.
    """

    diagonal: Floats
    pivots: Floats
    steps: Floats
    codes: npt.NDArray[np.uint8]
    order: npt.NDArray[np.int64]
    scales: Floats | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, rows: Floats, codes: npt.NDArray[np.uint8]) -> PackedMoment:
        """Take diagonal, pivots and steps from the rows of a (3, n) array."""
        return cls(rows[0], rows[1], rows[2], codes, np.argsort(-rows[0], kind="stable"))

    @property
    def size(self) -> int:
        return len(self.diagonal)

    @property
    def rows(self) -> Floats:
        """Undo :meth:`of`; not for a moment that was scaled."""
        return np.stack([self.diagonal, self.pivots, self.steps])

    @property
    def digest(self) -> bytes:
        """Return a SHA-256 of all that the moment is, and of how many tokens."""
        parts = (self.diagonal, self.pivots, self.steps, self.codes, self.order, self.scales)
        digest = hashlib.sha256(f"{self.tokens} {self.scales is None}".encode())
        for part in parts:
            digest.update(b"" if part is None else np.ascontiguousarray(part).data)
        return digest.digest()

    def check(self, name: str) -> None:
        """Refuse numbers that are no moment.

        Raises:
            ScoreFileError: a message that begins with ``name``.
        """
        wrong = None
        if not (np.isfinite(self.diagonal).all() and (self.diagonal >= 0).all()):
            wrong = "a diagonal that is negative or not finite"
        elif not (np.isfinite(self.pivots).all() and (self.pivots > 0).all()):
            wrong = "pivots that are not positive and finite"
        elif not (np.isfinite(self.steps).all() and (self.steps >= 0).all()):
            wrong = "steps that are negative or not finite"
        if wrong is not None:
            raise ScoreFileError(f"{name} has {wrong}; rank again")
        self._entries(name)

    def scaled(self, scales: Floats) -> PackedMoment:
        """Return the moment of vectors whose entries are multiplied by ``scales``."""
        before = 1 if self.scales is None else self.scales
        return replace(self, diagonal=self.diagonal * scales**2, scales=before * scales)

    def unpacked(self, name: str = "the second moment", part: Tensor | None = None) -> Tensor:
        """Return the moment, (n, n) float64, positive semidefinite.

        Args:
            part: columns of which the moment is wanted alone: the whole of a large one takes gigabytes.

        Raises:
            ScoreFileError: it overflows; the message begins with ``name``.
        """
        import torch

        places, diagonal = torch.from_numpy(np.argsort(self.order)), torch.from_numpy(self.diagonal).double()
        if part is not None:
            places, diagonal = places[part], diagonal[part]
        root = self.exact_root(name, torch.float64)[places]
        moment = root @ root.T
        moment.diagonal().copy_(diagonal)
        if not is_finite(moment):
            raise ScoreFileError(f"{name} overflows; rank again")
        return moment

    def exact_root(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a root R of the moment R R^T, (n, n), its rows in :attr:`order`.

        Raises:
            ScoreFileError: it overflows; the message begins with ``name``.
        """
        import torch

        root = self._unscaled_root(self._upper(name, dtype))
        root *= (torch.from_numpy(self.diagonal[self.order]).to(root.dtype).sqrt() / root.norm(dim=1))[:, None]
        if not is_finite(root):
            raise ScoreFileError(f"{name} overflows; rank again")
        return root

    def root(self, least: float, name: str = "the second moment") -> tuple[Tensor, Tensor]:
        """Return a root R of the moment R R^T and its inverse, (n, n) float64 each.

        Args:
            least: entries of the diagonal count as at least this share of their mean.

        Raises:
            ScoreFileError: it overflows; the message begins with ``name``.
        """
        import torch

        upper = self._upper(name, torch.float64)
        root = self._unscaled_root(upper.clone())
        diagonal, order = torch.from_numpy(self.diagonal).double(), torch.from_numpy(self.order)
        mean = float(diagonal.mean()) or 1.0
        scale = diagonal[order].clamp_min(least * mean).sqrt() / root.norm(dim=1)
        back = torch.from_numpy(np.argsort(self.order))
        root = root.mul_(scale[:, None])[back]
        inverse = upper.mul_(torch.from_numpy(self.pivots)[:, None]).div_(scale)[:, back]
        if not (is_finite(root) and is_finite(inverse)):
            raise ScoreFileError(f"{name} overflows; rank again")
        return root, inverse

    def feedback_factor(self, name: str = "the second moment") -> FeedbackFactor:
        """Return how errors are carried forward, beginning with the column of the largest moment.

        Of scaled inputs that are wide, in the order of before scaling.

        Raises:
            ScoreFileError: it overflows; the message begins with ``name``.
        """
        import torch

        chance = self.size / self.tokens if self.tokens else 0.0
        diagonal = torch.from_numpy(self.diagonal).double()
        upper, order = self._damped_upper(chance * diagonal + _FEEDBACK_DAMPING * diagonal.mean(), name), self.order
        if self.scales is not None and self.size <= SORTED_COLUMNS:
            order = np.argsort(-self.diagonal, kind="stable")
            # With its columns in another order it is orthogonal times what is wanted: their products are the same.
            upper = torch.linalg.qr(upper[:, torch.from_numpy(np.argsort(self.order)[order])], mode="r").R
        return FeedbackFactor.coded(order.astype(np.int32), upper.float().numpy())

    def row_factors(self, parts: Sequence[int], name: str) -> list[FeedbackFactor]:
        """Return how errors are carried among so many rows after others, the moment being of output gradients.

        Raises:
            ScoreFileError: it overflows; the message begins with ``name``.
        """
        import torch

        root = self.exact_root(name, torch.float32)[torch.from_numpy(np.argsort(self.order))]
        added = _ROW_DAMPING * float(self.diagonal.mean(dtype=np.float64)) or 1.0
        return [_row_factor(some @ some.T, added, name) for some in root.split([*parts])]  # type: ignore[no-untyped-call]

    def _damped_upper(self, added: Tensor, name: str) -> Tensor:
        """Factorize (H + A)^-1 = V^T V, V upper triangular, without making H: H^-1 = U^T U is known.

        With A diagonal that is A^-1/2 (A^-1/2 H A^-1/2 + 1)^-1 A^-1/2. Float32 does for that, unless inputs were scaled
        very differently since: what A has in proportion to the diagonal of H makes columns one size, and the rest of it
        is hardly more than what was added to H when it was packed. H is what U says of it: without its exact diagonal.

        Args:
            added: (n,) the diagonal of A.
        """
        import torch

        if not added.any():  # inputs that were never anything but zero: nothing can be made up for
            return torch.eye(self.size)
        order = torch.from_numpy(self.order)
        roots = added[order].sqrt()
        weights = roots if self.scales is None else roots / torch.from_numpy(self.scales).double()[order]
        apart = self.scales is not None and self.scales.max() > _SCALED_APART * self.scales.min()
        for dtype in (torch.float64,) if apart else (torch.float32, torch.float64):
            upper = self._upper(name, dtype)
            upper.mul_(torch.from_numpy(self.pivots).to(dtype)[:, None]).mul_(weights.to(dtype))
            if is_finite(add_one_(upper).div_(roots.to(dtype))):
                return upper
        raise ScoreFileError(f"{name} overflows; rank again")

    def _upper(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return U over its diagonal entries."""
        import torch

        size = self.size
        codes = np.zeros((size, size), np.int8)
        codes[above_diagonal(size)] = self._entries(name)
        upper = torch.from_numpy(codes).to(dtype).mul_(torch.from_numpy(self.steps)[:, None])
        upper.diagonal().fill_(1.0)
        return upper

    def _unscaled_root(self, upper: Tensor) -> Tensor:
        """Return U^-1, in the place of :meth:`_upper`."""
        import torch

        return invert_upper_(upper).div_(torch.from_numpy(self.pivots))

    def _entries(self, name: str) -> npt.NDArray[np.int8]:
        expected = self.size * (self.size - 1) // 2
        reader = zlib.decompressobj()
        try:
            data = reader.decompress(self.codes.tobytes(), expected + 1)
        except zlib.error as reason:
            raise ScoreFileError(
                f"{name} has codes that are damaged ({reason}); fetch or make the file again"
            ) from None
        if len(data) != expected or not reader.eof or reader.unused_data:
            raise ScoreFileError(f"{name} has {len(data)} codes, expected {expected}; fetch or make the file again")
        return np.frombuffer(data, np.int8)


def _row_factor(moment: Tensor, added: float, name: str) -> FeedbackFactor:
    """Return the factor of a moment with ``added`` on its diagonal."""
    import torch

    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    damped = moment[order[:, None], order]
    damped.diagonal().add_(added)
    # Backwards, for a lower factor of the reversed matrix is an upper one of the matrix.
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed or not is_finite(lower):
        raise ScoreFileError(f"{name} overflows; rank again")
    return FeedbackFactor.coded(order.int().numpy(), invert_upper_(lower.flip(0, 1).contiguous()).numpy())


def moment_name(key: str) -> str:
    """Return what messages call a second moment of the score file."""
    return f"the second moment {key!r}"


def pack_moment(moment: Tensor, name: str = "the second moment") -> PackedMoment:
    """Pack a symmetric (n, n) matrix, of which the upper triangle is looked at.

    Raises:
        ScoreFileError: it is not finite, or no second moment; the message begins with ``name``.
    """
    import torch

    wide = moment.detach().cpu().double().triu()
    if not is_finite(wide):
        raise ScoreFileError(f"{name} holds NaN or infinity; rank again, with more text or another  --precision")
    wide = wide + wide.triu(1).T
    size = len(wide)
    diagonal = wide.diagonal().float().clamp_min(0).numpy()
    order = np.argsort(-diagonal, kind="stable")
    mean = float(diagonal.astype(np.float64).mean())
    if mean == 0:  # nothing but zeros was ever seen
        ones, none = np.ones(size, np.float32), np.zeros(size, np.float32)
        return PackedMoment(diagonal, ones, none, _deflated(np.zeros(size * (size - 1) // 2, np.int8)), order)
    # Backwards: a lower factor of the reversed matrix is an upper one of the matrix.
    backwards = torch.from_numpy(order[::-1].copy())
    damped = wide[backwards[:, None], backwards]
    del wide
    added = 0.0
    for damping in _DAMPINGS:
        damped.diagonal().add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            del damped
            return _packed(diagonal, order, lower.flip(0, 1))
    raise ScoreFileError(f"{name} is none: it is not positive, even damped; rank again")


def _packed(diagonal: Floats, order: npt.NDArray[np.int64], upper: Tensor) -> PackedMoment:
    """Pack, given an upper root of the moment, which is overwritten."""
    import torch

    size = len(diagonal)
    invert_upper_(upper)
    pivots = upper.diagonal().float()
    above = upper.div_(upper.diagonal().clone()[:, None]).float().triu_(1)
    count = torch.arange(size - 1, -1, -1).clamp_min_(1)
    steps = torch.maximum(above.abs().amax(1) / _MOST, _STEP * above.norm(dim=1) / count.sqrt())
    codes = above.mul_((1 / steps).where(steps > 0, 0 * steps)[:, None]).round_().clamp_(-_MOST, _MOST).to(torch.int8)
    return PackedMoment(diagonal, pivots.numpy(), steps.numpy(), _deflated(codes.numpy()[above_diagonal(size)]), order)


def _deflated(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    # Codes do not repeat each other; how often each occurs is all that there is to gain.
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return np.frombuffer(stream.compress(codes.tobytes()) + stream.flush(), np.uint8)


def is_projected(shape: tuple[int, int]) -> bool:
    """Tell whether the moment of the output gradients of a layer (out, in) is kept by :func:`projected`."""
    return shape[0] > shape[1]


def pack_gradients(moment: Tensor, weight: Tensor, name: str = "the second moment") -> PackedMoment:
    """Pack the second moment (out, out) of the output gradients of ``weight`` (out, in); see :func:`pack_moment`."""
    wide = is_projected((weight.shape[0], weight.shape[1]))
    return pack_moment(projected(moment, weight) if wide else moment, name)


def projected(moment: Tensor, weight: Tensor) -> Tensor:
    """Return what a second moment G (out, out) of output gradients says about the columns of ``weight`` (out, in).

    With D the diagonal of G and P the orthonormal basis of the columns of D^1/2 W that Gram and Schmidt find, that is
    P^T D^-1/2 G D^-1/2 P, (in, in). Scaling rows or columns of W by positive numbers, and G with it, changes nothing.

    Args:
        moment: its upper triangle is looked at. Products are made in its dtype.
    """
    upper = moment.detach().cpu().triu()
    full = upper + upper.triu(1).T
    del upper
    scale = output_scale(full.diagonal())
    basis = column_basis(weight, scale).to(full.dtype)
    full /= scale.to(full.dtype)
    full /= scale.to(full.dtype)[:, None]
    part: Tensor = basis.T @ (full @ basis)
    return part


def lifted(part: Tensor, diagonal: Floats, weight: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return a second moment (out, out), float64, that :func:`projected` takes to ``part``.

    It is D^1/2 (I + P (part - I) P^T) D^1/2: gradients that do not meet the columns of the weight count as independent.
    Its diagonal is D only nearly therefore.

    Args:
        rows: outputs of which the moment is wanted alone.
    """
    import torch

    scale = output_scale(torch.from_numpy(diagonal))
    basis = column_basis(weight, scale)
    if rows is not None:
        basis, scale = basis[rows], scale[rows]
    change = part - torch.eye(len(part), dtype=torch.float64)
    moment: Tensor = basis @ change @ basis.T
    moment.diagonal().add_(1.0)
    moment *= scale
    moment *= scale[:, None]
    return moment


def output_scale(diagonal: Tensor) -> Tensor:
    """Return D^1/2, (out,) float64 and positive, for the diagonal D of a moment of output gradients."""
    wide = diagonal.double().clamp_min(0)
    scale: Tensor = wide.clamp_min(_LEAST * (float(wide.mean()) or 1.0)).sqrt()
    return scale


def column_basis(weight: Tensor, scale: Tensor) -> Tensor:
    """Orthonormalize the columns of the scaled weight, one after the other; dependent ones become next to nothing."""
    import torch

    scaled = weight.detach().cpu().double() * scale[:, None]
    gram = scaled.T @ scaled
    energy = gram.diagonal()
    gram.diagonal().add_(torch.where(energy > 0, _DEPENDENT * energy, torch.ones_like(energy)))
    lower = torch.linalg.cholesky(gram)
    basis: Tensor = torch.linalg.solve_triangular(lower, scaled.T, upper=False).T
    return basis
