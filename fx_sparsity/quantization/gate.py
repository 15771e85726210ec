"""The gate: what is true now, weight by weight, of a model that was sparsified and quantized."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import overload

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fx_sparsity.graph.passes import WEIGHT_META
from fx_sparsity.masks import tiling_holds
from fx_sparsity.quantization.codes import Codes
from fx_sparsity.quantization.stored import StoredWeight, float_weight
from fx_sparsity.sparsifier import Mask, MaskRecord
from fx_sparsity.tables import format_table


class SparsityLostError(RuntimeError):
    """Weights are not as sparse, or sparser, than they were masked to be; all are named."""


@dataclass(frozen=True)
class VerifiedWeight:
    """One row of a `Verification`.

    Attributes:
        fqn: name of the weight in the float model.
        where: what stores it now; empty where nothing does.
        dtype, scheme: of what is stored.
        quantized: whether it is stored as integer codes.
        meant: whether it was meant to be; None where nobody said.
        wanted: masked elements.
        zero_in_code: masked elements whose stored value is zero; for codes, exactly the zero point.
        zero_dequantized: masked elements that dequantize to zero.
        extra: kept elements that are zero though quantizing alone leaves them non-zero; None where
            there is nothing to compare with.
        pattern: that the mask was made with; None for a method without one.
        pattern_holds: whether the stored zeros obey it, for the weight as a whole where this copy
            stores only a part; None without a pattern.
        max_change: largest change of a kept value against quantizing alone; None as for `extra`.
        obstacle: what keeps the stored value from being what the consumer reads; empty as a rule.
    """

    fqn: str
    where: str
    dtype: str
    scheme: str
    quantized: bool
    meant: bool | None
    wanted: int
    zero_in_code: int
    zero_dequantized: int
    extra: int | None
    pattern: str | None
    pattern_holds: bool | None
    max_change: float | None
    obstacle: str = ""

    @property
    def share(self) -> float:
        """Share of masked elements that are zero in code space; 1 where nothing was masked."""
        return self.zero_in_code / self.wanted if self.wanted else 1.0

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, in words; empty where all is well."""
        if not self.where:
            return ("not found in the model",)
        faults = [self.obstacle] if self.obstacle else []
        if self.zero_in_code != self.wanted:
            faults.append(f"{self.wanted - self.zero_in_code} of {self.wanted} zeros lost")
        if self.extra:
            faults.append(f"{self.extra} zeros more than asked for")
        if self.pattern_holds is False:
            faults.append(f"pattern {self.pattern} broken")
        if self.meant and not self.quantized:
            faults.append("meant to be quantized, left in float")
        return tuple(faults)


@dataclass(frozen=True)
class Verification(Sequence[VerifiedWeight]):
    """What `verify` found: a row for every stored copy of every masked weight."""

    rows: tuple[VerifiedWeight, ...]

    @property
    def ok(self) -> bool:
        """Whether no row has a fault."""
        return not any(row.faults for row in self.rows)

    @property
    def share(self) -> float:
        """Share of all masked elements that are zero in code space."""
        wanted = sum(row.wanted for row in self.rows)
        return sum(row.zero_in_code for row in self.rows) / wanted if wanted else 1.0

    def raise_if_lost(self) -> "Verification":
        """Return self, or raise.

        Raises:
            SparsityLostError: naming every weight with a fault, and the fault.
        """
        lost = [f"{row.fqn}: {', '.join(row.faults)}" for row in self.rows if row.faults]
        if lost:
            raise SparsityLostError("\n".join(lost))
        return self

    def to_json(self) -> str:
        """The rows as a JSON list of objects, each with its `faults`."""
        return json.dumps([{**asdict(row), "faults": row.faults} for row in self.rows], indent=2)

    @overload
    def __getitem__(self, index: int) -> VerifiedWeight: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[VerifiedWeight, ...]: ...

    def __getitem__(self, index: int | slice) -> VerifiedWeight | tuple[VerifiedWeight, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[VerifiedWeight]:
        return iter(self.rows)

    def __str__(self) -> str:
        header = (
            "weight",
            "stored as",
            "pattern",
            "masked",
            "zero in code space",
            "extra zeros",
            "max change",
            "verdict",
        )
        rows = [
            (
                row.fqn,
                f"{row.dtype}, {row.scheme}" if row.where else "-",
                row.pattern,
                row.wanted,
                f"{row.zero_in_code} ({row.share:.1%})",
                row.extra,
                row.max_change,
                "; ".join(row.faults) or "ok",
            )
            for row in self.rows
        ]
        return format_table(header, rows)


def read_weights(model: nn.Module) -> list[StoredWeight]:
    """How a model stores its weights now: quantized modules, quantized graphs, float tensors.

    Args:
        model: a module; or a GraphModule on which `AnnotateWeights` ran before it was quantized.
    """
    if isinstance(model, fx.GraphModule) and any(WEIGHT_META in n.meta for n in model.graph.nodes):
        from fx_sparsity.quantization.pt2e import read_graph

        return list(read_graph(model))
    stored = list(_read_float(model))
    if any(
        isinstance(module, Codes) or "quantized" in type(module).__module__
        for module in model.modules()
    ):
        from fx_sparsity.quantization.eager import read_modules

        stored += read_modules(model)
    return stored


def _read_float(model: nn.Module) -> Iterator[StoredWeight]:
    """Floating parameters and buffers under each name; masked ones as the model sees them."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Mask | parametrize.ParametrizationList | Codes):
            continue
        names = [*module._parameters, *module._buffers]
        names += getattr(module, "parametrizations", {})
        for attribute in names:
            tensor = getattr(module, attribute)
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                fqn = f"{prefix}.{attribute}".removeprefix(".")
                yield float_weight(fqn, fqn, tensor)


def verify(
    model: nn.Module,
    record: Mapping[str, MaskRecord],
    *,
    reference: nn.Module | None = None,
    meant: Collection[str] | None = None,
) -> Verification:
    """Check, weight by weight, that what was masked is zero, and nothing else is.

    Zero means zero in code space: the stored code is the one that dequantizes to exactly zero. A
    float weight has to be zero itself. A tied weight is checked wherever it is stored.

    Args:
        model: sparsified, and quantized or not. Not changed.
        record: what `squash` returned, or a flow made.
        reference: the same model, quantized alike, without masks. With it, zeros beyond those that
            quantizing alone makes are found, and kept values are compared. Without it, only a float
            weight's further zeros are found.
        meant: FQNs of the weights that were meant to be quantized.
    """
    stored = _by_name(read_weights(model), record)
    alone = {} if reference is None else _by_name(read_weights(reference), record)
    rows: list[VerifiedWeight] = []
    for fqn, mask in record.items():
        intended = None if meant is None else fqn in meant
        copies = stored[fqn]
        holds = _holds(copies, mask)
        for i, weight in enumerate(copies):
            counterpart = alone[fqn][i] if fqn in alone and i < len(alone[fqn]) else None
            rows.append(_row(fqn, weight, mask, counterpart, intended, holds[i]))
        if not copies:
            wanted = int((~mask.keep).sum())
            rows.append(
                VerifiedWeight(
                    fqn, "", "", "", False, intended, wanted, 0, 0, None, mask.pattern, None, None
                )
            )
    return Verification(tuple(rows))


def _by_name(
    weights: Iterable[StoredWeight], record: Mapping[str, MaskRecord]
) -> dict[str, list[StoredWeight]]:
    """Every stored copy of each recorded weight, one tensor once."""
    canonical = {alias: fqn for fqn, mask in record.items() for alias in (fqn, *mask.aliases)}
    found: dict[str, list[StoredWeight]] = {fqn: [] for fqn in record}
    seen: set[tuple[str, int]] = set()
    for weight in weights:
        fqn = canonical.get(weight.fqn)
        if fqn is None:
            continue
        if not weight.quantized and weight.data.device.type != "meta":
            place = (fqn, weight.data.data_ptr())
            if place in seen:
                continue
            seen.add(place)
        found[fqn].append(weight)
    return found


def _holds(copies: Sequence[StoredWeight], mask: MaskRecord) -> list[bool | None]:
    """Whether the zeros of each copy obey the pattern; parts of a weight are judged together."""
    tiling, level = mask.tiling, mask.level
    if tiling is None or level is None or not mask.keep.numel():
        return [None] * len(copies)
    whole = ~mask.keep  # what no part covers is not in question here
    for part in copies:
        if part.view is not None and not part.obstacle:
            part.put(whole, part.zeros())
    parts = tiling_holds(whole, tiling, level)
    return [
        None
        if copy.obstacle
        else parts
        if copy.view is not None
        else tiling_holds(copy.zeros(), tiling, level)
        for copy in copies
    ]


def _row(
    fqn: str,
    weight: StoredWeight,
    mask: MaskRecord,
    alone: StoredWeight | None,
    meant: bool | None,
    holds: bool | None,
) -> VerifiedWeight:
    device = weight.data.device
    keep = weight.seen(mask.keep).to(device)
    extra: int | None = None
    max_change: float | None = None
    zero_in_code = zero_dequantized = 0
    if not weight.obstacle:
        zeros, values = weight.zeros(), weight.dequantize()
        zero_in_code = int((zeros & ~keep).sum())
        zero_dequantized = int(((values == 0) & ~keep).sum())
        if alone is not None and not alone.obstacle:
            extra = int((zeros & keep & ~alone.zeros()).sum())
            change = (values - alone.dequantize()).abs()[keep]
            max_change = float(change.max()) if change.numel() else 0.0
        elif not weight.quantized:
            extra = int((zeros & keep & ~mask.kept_zeros.to(device)).sum())
    return VerifiedWeight(
        fqn=fqn,
        where=weight.where,
        dtype=weight.dtype,
        scheme=weight.scheme,
        quantized=weight.quantized,
        meant=meant,
        wanted=int((~keep).sum()),
        zero_in_code=zero_in_code,
        zero_dequantized=zero_dequantized,
        extra=extra,
        pattern=mask.pattern,
        pattern_holds=holds,
        max_change=max_change,
        obstacle=weight.obstacle,
    )
