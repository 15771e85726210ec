"""What a checkpoint holds: the zeros of every tensor, their pattern, and bytes in each format."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.checkpoints.checkpoint_record import stated_patterns
from fx_sparsity.checkpoints.weights import Roles, find_checkpoint_weights
from fx_sparsity.masks import tightest_pattern, tiling_holds
from fx_sparsity.patterns import Role
from fx_sparsity.progress import progress
from fx_sparsity.reports import Bytes, Report, Share, Table, natural
from fx_sparsity.storage import Contents, sizes

DENSE_BELOW = 0.01
"""Share of zeros below which a weight counts as dense: some values of any weight are zero."""

Look = Callable[[str, Tensor, Sequence[Role]], object]
"""Called with the name of a tensor, where it is zero, and the roles of its axes, if known."""


@dataclass(frozen=True)
class InspectedTensor:
    """One tensor.

    Attributes:
        fqn: its name.
        dtype: such as `float32`.
        shape: of it.
        elements, zeros: how many there are.
        pattern: the tightest that the zeros follow, `dense` below 1% of zeros; None of what is no
            weight.
        bytes: that the file takes for it.
        formats: name of a format that can hold it -> bytes in that.
        stated: the pattern and level that `sparsity.json` states; None where it states none.
        holds: whether the zeros obey that.
    """

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    zeros: int
    pattern: str | None
    bytes: int
    formats: Mapping[str, int]
    stated: str | None = None
    holds: bool | None = None

    @property
    def sparsity(self) -> Share:
        """Share of zeros."""
        return Share(self.zeros / self.elements if self.elements else 0.0)

    @property
    def smallest(self) -> int:
        """Bytes in the format that takes fewest."""
        return min(self.formats.values())

    @property
    def verdict(self) -> str | None:
        """`ok` or `broken`, where a pattern is stated."""
        return None if self.holds is None else "ok" if self.holds else "broken"


@dataclass(frozen=True)
class Inspection(Report):
    """Every tensor of a checkpoint.

    Attributes:
        rows: in natural order of their names.
    """

    rows: tuple[InspectedTensor, ...]

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(row.elements for row in self.rows)

    @property
    def zeros(self) -> int:
        """Of all tensors."""
        return sum(row.zeros for row in self.rows)

    @property
    def sparsity(self) -> Share:
        """Share of zeros among all elements."""
        return Share(self.zeros / self.elements if self.elements else 0.0)

    @property
    def bytes(self) -> Bytes:
        """That the files take for all tensors."""
        return Bytes(sum(row.bytes for row in self.rows))

    @property
    def smallest(self) -> Bytes:
        """Bytes with the smallest format for each tensor."""
        return Bytes(sum(row.smallest for row in self.rows))

    @property
    def tables(self) -> tuple[Table, ...]:
        """A row a tensor."""
        rows = [
            (
                row.fqn,
                row.dtype,
                "x".join(map(str, row.shape)),
                row.sparsity,
                row.pattern,
                Bytes(row.bytes),
                Bytes(row.smallest),
            )
            for row in self.rows
        ]
        header = ("tensor", "dtype", "shape", "sparsity", "pattern", "bytes", "smallest")
        return (Table(header, rows),)

    @property
    def summary(self) -> str:
        """How much there is, how much of it is zero, and what it takes."""
        return (
            f"{len(self.rows)} tensors, {self.elements:,} values, {self.sparsity} zeros; "
            f"{self.bytes}, {self.smallest} with the smallest format for each tensor"
        )

    def __str__(self) -> str:
        return f"{self.tables[0]}\n\n{self.summary}"


def inspect_checkpoint(
    checkpoint: Checkpoint,
    roles: Roles | None = None,
    *,
    stated: bool = False,
    look: Look | None = None,
) -> Inspection:
    """Read every tensor, one after another.

    Args:
        checkpoint: to read.
        roles: as `find_checkpoint_weights` takes them.
        stated: whether to check what `sparsity.json` states.
        look: called with the zeros of every tensor.

    Raises:
        CheckpointError: `sparsity.json` states nothing, or speaks of a tensor that is not there.
        FileFormatError: a file contradicts itself.
    """
    sites = find_checkpoint_weights(checkpoint, roles).by_any_name()
    configs, axes = stated_patterns(checkpoint) if stated else ({}, {})
    _check_held(checkpoint, configs)
    rows = []
    for name, tensor in read_tensors(checkpoint, "inspecting"):
        zero = tensor == 0
        site, config = sites.get(name), configs.get(name)
        holds = None
        if config is not None:
            tiling = config.pattern.tiling(tensor.shape, axes[name])
            holds = tiling_holds(zero, tiling, config.level)
        row = InspectedTensor(
            fqn=name,
            dtype=str(tensor.dtype)[6:],
            shape=tuple(tensor.shape),
            elements=tensor.numel(),
            zeros=int(zero.count_nonzero()),
            pattern=None if site is None else _pattern(zero, site.roles),
            bytes=checkpoint.files[checkpoint.where[name]].stored_bytes(name),
            formats=sizes(Contents(tensor)),
            stated=None if config is None else str(config),
            holds=holds,
        )
        rows.append(row)
        if look is not None:
            look(name, zero, () if site is None else site.roles)
    return Inspection(tuple(sorted(rows, key=lambda row: natural(row.fqn))))


def read_tensors(
    checkpoint: Checkpoint, what: str, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors one after another, with a progress bar.

    Args:
        checkpoint: that holds them.
        what: is done with them.
        names: of some; all by default.

    Raises:
        CheckpointError: one is not there.
    """
    names = [*(checkpoint.where if names is None else names)]
    _check_held(checkpoint, names)
    nbytes = {name: checkpoint.files[checkpoint.where[name]].stored_bytes(name) for name in names}
    with progress(what, sum(nbytes.values()), True, in_bytes=True) as advance:
        for name, size in nbytes.items():
            yield name, checkpoint.read(name)
            advance(name, size)


def _check_held(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    for name in names:
        if name not in checkpoint.where:
            raise CheckpointError(f"{name}: not in {checkpoint.folder}")


def _pattern(zero: Tensor, roles: Sequence[Role]) -> str:
    config = tightest_pattern(zero, roles)
    share = int(zero.count_nonzero()) / max(1, zero.numel())
    return "dense" if config is None or share < DENSE_BELOW else config.short
