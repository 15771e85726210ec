"""What `diff` shows of two checkpoints: a row for each tensor that differs."""

from typing import Any

from torch import Tensor

from fx_sparsity.checkpoints import Checkpoint, read_tensors
from fx_sparsity.reports import natural
from fx_sparsity.storage import Contents


def differences(
    left: Checkpoint, right: Checkpoint, paths: tuple[str, str]
) -> list[dict[str, Any]]:
    """Rows in natural order of the names, all with the same keys.

    Args:
        left: the one.
        right: the other.
        paths: what to call them.
    """
    rows = [
        _row(name, f"only in {path}")
        for one, other, path in ((left, right, paths[0]), (right, left, paths[1]))
        for name in one.where
        if name not in other.where
    ]
    both = [name for name in left.where if name in right.where]
    for name, ours in read_tensors(left, "comparing", both):
        theirs = right.read(name)
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            kinds = [f"{str(t.dtype)[6:]} {'x'.join(map(str, t.shape))}" for t in (ours, theirs)]
            rows.append(_row(name, " -> ".join(kinds)))
        elif (row := _compare(name, ours, theirs)) is not None:
            rows.append(row)
    return sorted(rows, key=lambda row: natural(row["tensor"]))


def _compare(name: str, ours: Tensor, theirs: Tensor) -> dict[str, Any] | None:
    """A row where two tensors of one dtype and shape differ, bit by bit."""
    a, b = Contents(ours).integers, Contents(theirs).integers
    unequal = a != b
    if not unequal.any():
        return None
    x, y = ours.reshape(-1)[unequal], theirs.reshape(-1)[unequal]
    added, lost = int((y == 0).sum()), int((x == 0).sum())
    kept = (x != 0) & (y != 0)
    change = (x[kept].double() - y[kept].double()).abs()
    largest = f"{change.max().item():.3g}" if len(change) else None
    return _row(name, "values", added, lost, int(kept.count_nonzero()), largest)


def _row(
    name: str,
    what: str,
    added: int | None = None,
    lost: int | None = None,
    changed: int | None = None,
    largest: str | None = None,
) -> dict[str, Any]:
    return {
        "tensor": name,
        "differs in": what,
        "zeros added": added,
        "zeros lost": lost,
        "changed": changed,
        "largest": largest,
    }
