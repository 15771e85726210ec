"""The Hessian of a layer's reconstruction error, H = X X^T + damping, and its inverse's factor."""

from dataclasses import dataclass

import torch
from torch import Tensor

_DEAD = 1e-9
"""Damping of an input that is always zero, as a share of the mean diagonal: any that vanishes
against a live input's, so that its weights go first, among themselves by magnitude."""
_BASE = 256  # below this size LAPACK's own triangular inverse is fastest


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
        if not bool(torch.isfinite(gram).all()) or bool((diagonal < 0).any()):
            raise ValueError("the Gram matrix holds NaN, infinities or a negative diagonal")
        dead = int((diagonal == 0).sum())
        text = f"{dead} of {len(diagonal)} inputs are always zero; their weights go first"
        return Hessian(gram, damping, (text,) if dead else ())

    def matrix(self) -> Tensor:
        """H itself, [in, in]."""
        diagonal = self.gram.diagonal()
        shares = torch.where(diagonal == 0, _DEAD, self.damping)
        matrix = self.gram.clone()
        matrix.diagonal().add_(shares * diagonal.mean())
        return matrix

    def permuted(self, order: Tensor) -> "Hessian":
        """The same inputs in another order."""
        return Hessian(self.gram[order][:, order], self.damping, self.notes)

    def inverse_factor(self) -> tuple[Tensor, "Hessian"]:
        """The upper triangular U with U^T U = H^-1 (arXiv 2301.00774, section 3.3).

        Turning H by 180 degrees turns its Cholesky factor's inverse into U, so that H^-1 itself is
        never needed.

        Returns:
            U, [in, in], and the Hessian that it belongs to: with more damping, and a note on it,
            where this one is not positive definite in float32.
        """
        lower, failed = torch.linalg.cholesky_ex(self.matrix().flip(0, 1))
        if not bool(failed):
            return _triangular_inverse(lower).flip(0, 1).contiguous(), self
        raised = max(10 * self.damping, 1e-6)
        note = (
            f"the Hessian is not positive definite with a damping of {self.damping:g} of the mean "
            f"diagonal; raised to {raised:g}"
        )
        return Hessian(self.gram, raised, (*self.notes, note)).inverse_factor()


def _triangular_inverse(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, by halves: a third of a general solve's work."""
    size = len(lower)
    if size <= _BASE:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = size // 2
    first, second = (
        _triangular_inverse(lower[:half, :half]),
        _triangular_inverse(lower[half:, half:]),
    )
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = first
    inverse[half:, half:] = second
    torch.mm(second @ lower[half:, :half], -first, out=inverse[half:, :half])
    return inverse
