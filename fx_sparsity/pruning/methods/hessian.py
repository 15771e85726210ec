"""The Hessian of a layer's reconstruction error, H = X X^T + damping, and its root."""

from dataclasses import dataclass

import torch
from torch import Tensor

_DEAD = 1e-9
"""Damping of an input that is always zero, as a share of the mean diagonal: any that vanishes
against a live input's, so that its weights go first, among themselves by magnitude."""
_BASE = 512  # size up to which LAPACK's Cholesky factor is fastest
_PADDING = 16
_ROWS = 128  # that are put in order together


@dataclass(frozen=True)
class Hessian:
    """H = X X^T + damping * mean(diag(X X^T)) * I, for one matrix of inputs.

    Attributes:
        gram: X X^T, float32 [in, in].
        damping: as a share of the mean diagonal.
        notes: about inputs that are always zero, and damping that had to be raised.
    """

    gram: Tensor
    damping: float
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(gram: Tensor, damping: float) -> "Hessian":
        """Check a Gram matrix.

        Raises:
            ValueError: it holds NaN, infinities or a negative diagonal, and is no Gram matrix.
        """
        diagonal = gram.diagonal()
        if not bool(torch.isfinite(gram.sum())) or bool((diagonal < 0).any()):
            raise ValueError("the Gram matrix holds NaN, infinities or a negative diagonal")
        dead = int((diagonal == 0).sum())
        text = f"{dead} of {len(diagonal)} inputs are always zero; their weights go first"
        return Hessian(gram, damping, (text,) if dead else ())

    def diagonal(self) -> Tensor:
        """Of H, [in]."""
        diagonal = self.gram.diagonal()
        shares = torch.where(diagonal == 0, _DEAD, self.damping)
        return diagonal + shares * diagonal.mean()

    def matrix(self, order: Tensor | None = None) -> Tensor:
        """H itself, [in, in], its inputs in an order of theirs; rows are padded in memory."""
        width = len(self.gram)
        # Rows of 2^k elements alone would all fall into the same few sets of a cache.
        matrix = self.gram.new_empty(width, width + _PADDING)[:, :width]
        if order is None:
            matrix.copy_(self.gram).diagonal().copy_(self.diagonal())
            return matrix
        for part, rows in zip(matrix.split(_ROWS), order.split(_ROWS), strict=True):
            part.copy_(self.gram.index_select(0, rows).index_select(1, order))
        matrix.diagonal().copy_(self.diagonal()[order])
        return matrix

    def root(self, order: Tensor | None = None) -> tuple[Tensor, "Hessian"]:
        """The upper triangular R with R R^T = H, so that U = R^-1 is the factor of H^-1 = U^T U.

        Neither H^-1 nor the whole of U (arXiv 2301.00774, section 3.3) is ever needed: see `sweep`.

        Args:
            order: of the inputs in R.

        Returns:
            R, [in, in], where what lies below the diagonal means nothing; and the Hessian that it
            belongs to: with more damping, and a note on it, where this one is not positive definite
            in float32.
        """
        matrix = self.matrix(order)
        if _take_root(matrix):
            return matrix, self
        raised = max(10 * self.damping, 1e-6)
        note = (
            f"the Hessian is not positive definite with a damping of {self.damping:g} of the mean "
            f"diagonal; raised to {raised:g}"
        )
        return Hessian(self.gram, raised, (*self.notes, note)).root(order)


def _take_root(matrix: Tensor) -> bool:
    """Turn a symmetric matrix into its R, in place; False where it is not positive definite.

    By halves: [[A, B], [B^T, C]] has R = [[R1, X], [0, R2]] with R2 R2^T = C, X R2^T = B and
    R1 R1^T = A - X X^T. A small R is a Cholesky factor turned by 180 degrees.
    """
    size = len(matrix)
    if size <= _BASE:
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        matrix.copy_(lower.flip(0, 1))
        return not bool(failed)
    half = size // 2
    first, beside, second = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    if not _take_root(second):
        return False
    beside.copy_(torch.linalg.solve_triangular(second.mT, beside, upper=False, left=False))
    first.addmm_(beside, beside.mT, alpha=-1)
    return _take_root(first)
