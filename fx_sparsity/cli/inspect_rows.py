"""What `inspect` shows of a checkpoint: a row a tensor, or a row a pattern."""

from typing import Any

from fx_sparsity.checkpoints import InspectedTensor, Inspection
from fx_sparsity.cli.display import grouped
from fx_sparsity.reports import Bytes, Share
from fx_sparsity.storage import FORMATS


def tensor_row(row: InspectedTensor) -> dict[str, Any]:
    """Bytes in each format; None where that cannot hold the tensor."""
    return {
        "tensor": row.fqn,
        "dtype": row.dtype,
        "shape": "x".join(map(str, row.shape)),
        "sparsity": row.sparsity,
        "pattern": row.pattern,
        "bytes": row.bytes,
        **{form: row.formats.get(form) for form in FORMATS},
    }


def totals_of(found: Inspection) -> dict[str, Any]:
    """What a format cannot hold counts as dense."""
    each = {f: sum(r.formats.get(f, r.formats["dense"]) for r in found.rows) for f in FORMATS}
    return {"sparsity": found.sparsity, "bytes": int(found.bytes), **each}


def by_pattern(found: Inspection) -> list[dict[str, Any]]:
    """Tensors whose zeros follow the same pattern, at any level, together."""
    rows = [
        {
            "tensor": row.fqn,
            "pattern": _without_level(row.pattern or "no weight"),
            "values": row.elements,
            "zeros": row.zeros,
            "bytes": row.bytes,
            "smallest": row.smallest,
        }
        for row in found.rows
    ]
    groups = grouped(rows, "pattern", ("values", "zeros", "bytes", "smallest"))
    return [
        {
            "pattern": group["pattern"],
            "tensors": group["tensors"],
            "values": group["values"],
            "sparsity": Share(group["zeros"] / max(1, group["values"])),
            "bytes": Bytes(group["bytes"]),
            "smallest": Bytes(group["smallest"]),
            "such as": group["such as"],
        }
        for group in groups
    ]


def _without_level(pattern: str) -> str:
    return pattern.rpartition(" ")[0] if pattern.endswith("%") else pattern
