"""Sums over all inputs of one weight."""

from collections.abc import Iterator, Set
from dataclasses import replace

import torch
from torch import Tensor

from fx_sparsity.graph.weight_inputs import WeightInputs
from fx_sparsity.pruning.matrix_form import MatrixForm
from fx_sparsity.pruning.methods import Statistic, Statistics
from fx_sparsity.pruning.methods.groups import FilledTiling


class Collector:
    """The statistics of one weight as they grow.

    A table has no Gram matrix: that of its one-hot inputs is diagonal, and `squares` is its
    diagonal.

    Args:
        form: of the weight.
        needs: what is asked for.
        device: of the sums.
        table: whether the weight is looked up.
    """

    def __init__(
        self, form: MatrixForm, needs: Set[Statistic], device: torch.device, table: bool
    ) -> None:
        groups, _, size = form.sizes
        self.form = form

        def zeros(wanted: bool, *shape: int) -> Tensor | None:
            return torch.zeros(groups, *shape, device=device) if wanted else None

        gram = "gram" in needs and not table
        self._sums = Statistics(
            tokens=torch.zeros(groups, dtype=torch.float64, device=device),
            squares=zeros("input_norm" in needs or ("gram" in needs and table), size),
            sums=zeros("input_mean" in needs, size),
            gram=zeros(gram, size, size),
        )

        self._numbers = torch.arange(groups * size, device=device)

    @property
    def statistics(self) -> Statistics:
        """The sums, with tokens as whole numbers.

        Filling has inputs like the mean of the others in size: it is no input that is always zero.
        """
        gram, tiling = self._sums.gram, self.form.tiling
        if gram is not None and isinstance(tiling, FilledTiling):
            diagonal = gram.diagonal(dim1=1, dim2=2)
            own = diagonal.sum(1, keepdim=True) - diagonal[:, tiling.filling].sum(1, keepdim=True)
            diagonal[:, tiling.filling] = own / self.form.width
        return replace(self._sums, tokens=self._sums.tokens.round().long())

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        return sum(t.nbytes for t in vars(self._sums).values() if t is not None)

    def add(self, inputs: WeightInputs) -> None:
        """Take in one call."""
        if torch.equal(inputs.columns.reshape(-1), self._numbers):
            self._add(slice(None), slice(None), inputs)
            return
        for columns, rows in _alike(inputs.columns):
            mine = columns >= 0
            if not bool(mine.any()):
                continue
            held, places = columns[mine] // self.form.sizes[2], columns[mine] % self.form.sizes[2]
            assert bool((held == held[0]).all())  # one product reduces one group of the weight
            group = int(held[0])
            self._add(slice(group, group + 1), places, _part(inputs, rows, mine))

    def _add(self, group: slice, places: slice | Tensor, inputs: WeightInputs) -> None:
        """Add inputs of some groups, and only these of their columns.

        Inputs of a part of the outputs count for that part: three slices of one weight with the
        same inputs make up the whole that has them once.
        """
        stats, outputs, size = self._sums, self.form.sizes[1], self.form.width
        share = inputs.out / outputs
        found = size if isinstance(places, slice) else len(places)
        stats.tokens[group] += inputs.tokens * share * found / size
        x, counts = None if inputs.x is None else inputs.x.float(), inputs.counts
        if stats.squares is not None:
            squares = x.square().sum(1) if x is not None else counts[1]  # type: ignore[index]
            stats.squares[group, places] += share * squares
        if stats.sums is not None:
            sums = x.sum(1) if x is not None else counts[0]  # type: ignore[index]
            stats.sums[group, places] += share * sums
        if stats.gram is not None and x is not None:
            if isinstance(places, slice):
                stats.gram[group].baddbmm_(x.mT, x, alpha=share)
            else:
                stats.gram[group, places.unsqueeze(1), places] += share * (x.mT @ x)


def _alike(columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(columns, which rows have them): one expert has many of the inputs that picked it."""
    if len(columns) == 1:
        yield columns[0], columns.new_zeros(1)
        return
    distinct, which = columns.unique(dim=0, return_inverse=True)
    for i, found in enumerate(distinct):
        yield found, (which == i).nonzero().flatten()


def _part(inputs: WeightInputs, rows: Tensor, mine: Tensor) -> WeightInputs:
    """Rows of inputs as the inputs of one group, and some of their columns."""
    if inputs.x is None:
        assert inputs.counts is not None
        return inputs._replace(counts=inputs.counts[:, rows].sum(1, keepdim=True)[..., mine])
    x = inputs.x[rows].flatten(0, 1)[:, mine].unsqueeze(0)
    return inputs._replace(x=x, tokens=x.shape[1])
