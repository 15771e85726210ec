"""Embedding tables as lowering reads them, and the modules that hold them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.patterns import Role
from fx_sparsity.quantization.codes import CodedWeight
from fx_sparsity.quantization.torch_ao.modules import read_quantized
from fx_sparsity.quantization.torchao_tensors import is_torchao

ROWS = "rows"
"""Name of the packing of tables: without their rows of zeros, and a map to those that are left."""

Lookup = RowPrunedEmbedding | RowPrunedEmbeddingBag


@dataclass(frozen=True, eq=False)
class DenseTable:
    """A table and the module that looks things up in it.

    Attributes:
        module: as it is in the model.
        zeros: [rows, columns], what means zero.
        nbytes: of the table with its scales.
        dtype: of what is stored, such as `uint8`.
    """

    module: nn.Module
    zeros: Tensor
    nbytes: int
    dtype: str

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of the axes of `zeros`."""
        return "row", "dim"

    @property
    def shape(self) -> torch.Size:
        """Rows and columns."""
        return self.zeros.shape

    @property
    def density(self) -> float:
        """Share of values that are not zero."""
        count = self.zeros.numel()
        return 1 - int(self.zeros.count_nonzero()) / count if count else 0.0

    @property
    def device(self) -> torch.device:
        """Where the table lies."""
        return self.zeros.device

    @property
    def input_dtype(self) -> torch.dtype:
        """Of the indices."""
        return torch.int64

    @property
    def mode(self) -> str:
        """`lookup`, or what bags do with the rows that they look up."""
        return str(getattr(self.module, "mode", "lookup"))

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the kernel takes indices of that dtype."""
        return dtype in (torch.int32, torch.int64)

    def candidates(self) -> tuple[dict[str, Lookup], list[str]]:
        """The table in each packing that fits, by its name; and why the others do not."""
        if (refusal := self.refusal(ROWS)) is not None:
            return {}, [f"{ROWS}: {refusal}"]
        return {ROWS: self.pack(ROWS)}, []

    def refusal(self, packing: str) -> str | None:
        """Why a packing, which is `"rows"`, does not serve it; None if it does."""
        pruned = bool(self.zeros.all(1).any())
        return None if pruned else "none of its rows is zero throughout"

    @property
    def norms(self) -> tuple[float, float] | None:
        """The type and the most of the norm of a row, where lookups rescale rows."""
        most: Any = getattr(self.module, "max_norm", None)
        return None if most is None else (float(self.module.norm_type), most)  # type: ignore[arg-type]

    def pack(self, packing: str, tied: Lookup | None = None) -> Lookup:
        """The same lookups in a table without its zero rows.

        Args:
            packing: `"rows"`.
            tied: packed of the same weight and norms, to share its table.
        """
        source: Any = self.module
        bag = isinstance(source, nn.EmbeddingBag | nnq.EmbeddingBag)
        kind: Any = RowPrunedEmbeddingBag if bag else RowPrunedEmbedding
        options = {name: getattr(source, name, None) for name in ("padding_idx", *_BAG * bag)}
        if tied is not None:
            return kind(tied.table, tied.dtype, **options)
        if isinstance(source, CodedWeight):
            held = source._weight_codes
            codes, zero_point, dtype = held.codes, held.zero_point, held.dtype
            return kind.from_codes(codes, held.scale, zero_point, dtype=dtype, **options)
        if is_traceable_wrapper_subclass(getattr(source, "weight", None)):
            weight = source.weight
            # The kernel's codes have no sign.
            codes = (weight.qdata.to(torch.int16) + 128).to(torch.uint8)
            scale = weight.scale.float()
            zero_point = torch.full_like(scale, 128)
            return kind.from_codes(codes, scale, zero_point, dtype=weight.dtype, **options)
        return kind.from_dense(source)


_BAG = ("mode", "include_last_offset")
_KINDS = (nn.Embedding, nn.EmbeddingBag, nnq.Embedding, nnq.EmbeddingBag)


def holds_table(module: nn.Module) -> bool:
    """Whether a module is an embedding or a bag, quantized or not."""
    return isinstance(module, _KINDS)


def read_table(module: Any) -> DenseTable | str:
    """The table of such a module; or, in words, why it cannot be replaced."""
    coded = isinstance(module, CodedWeight)
    kind = type(module).__bases__[-1] if coded else type(module)
    if kind not in _KINDS:
        return f"{kind.__name__} may have a forward of its own"
    if coded:
        stored = module._weight_codes.stored("weight")
    elif isinstance(module, nnq.Embedding):
        stored = read_quantized("weight", module)
    else:
        weight: Any = module.weight.detach()
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return f"no kernel for {weight.dtype}"
        if is_traceable_wrapper_subclass(weight):
            return _signed_codes(module, weight)
        return DenseTable(module, weight == 0, weight.nbytes, str(weight.dtype)[6:])
    if stored.obstacle or stored.dtype not in ("uint8", "quint8", "quint4x2"):
        return stored.obstacle or f"no kernel for {stored.dtype}"
    if stored.dtype == "quint4x2" and stored.data.shape[1] % 2:
        return "no kernel for 4-bit codes in an odd number of columns"
    bits = 4 if stored.dtype == "quint4x2" else 8
    rows, columns = stored.data.shape
    return DenseTable(module, stored.zeros(), rows * (columns * bits // 8 + 8), stored.dtype)


def _signed_codes(module: nn.Module, weight: Any) -> DenseTable | str:
    """A table that is one of torchao's tensors; or why there is no kernel for it."""
    if not is_torchao(weight) or weight.is_meta:
        return f"no kernel for a {type(weight).__name__} on {weight.device.type}"
    from fx_sparsity.quantization.torchao_codes import read_tensor

    stored = read_tensor("weight", weight)
    by_row = stored.scale is not None and stored.scale.shape == (len(stored.data), 1)
    shifted = stored.zero_point is not None and bool(stored.zero_point.any())
    if stored.dtype != "int8" or not by_row or shifted:
        return f"no kernel for a {type(weight).__name__} of {stored.dtype}, {stored.scheme}"
    nbytes = stored.data.nbytes + weight.scale.nbytes
    return DenseTable(module, stored.zeros(), nbytes, stored.dtype)


def dense_table(packed: Lookup) -> nn.Module:
    """An embedding or a bag with all rows, +0.0 where they were pruned; codes become values."""
    weight = packed.dense_weight()
    if isinstance(packed, RowPrunedEmbedding):
        module: nn.Module = nn.Embedding.from_pretrained(weight, padding_idx=packed.padding_idx)
    else:
        module = nn.EmbeddingBag.from_pretrained(
            weight,
            mode=packed.mode,
            padding_idx=packed.padding_idx,
            include_last_offset=packed.include_last_offset,
        )
    return module.train(packed.training)
