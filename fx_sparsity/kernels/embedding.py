"""Embeddings and embedding bags over row-pruned tables, as modules."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from fx_sparsity.kernels.embedding_ops import (
    MODES,
    NO_PADDING,
    RESULTS,
    bag_of_positions,
    check_indices,
)
from fx_sparsity.kernels.packed_module import PackedModule
from fx_sparsity.kernels.panels import PackingError
from fx_sparsity.kernels.row_table import RowTable
from fx_sparsity.quantization.codes import CodedWeight


class _RowPruned(PackedModule):
    """A row-pruned table in buffers."""

    rows: Tensor
    affine: Tensor | None
    remap: Tensor

    def __init__(self, table: RowTable, dtype: torch.dtype, padding_idx: int | None) -> None:
        super().__init__()
        table.check()
        if dtype not in RESULTS:
            raise TypeError(f"expected float32 or bfloat16 as the dtype of results, found {dtype}")
        self.num_embeddings, self.embedding_dim = table.remap.numel(), table.columns
        if padding_idx is not None and not 0 <= padding_idx < self.num_embeddings:
            raise ValueError(
                f"expected a padding_idx from 0 to {self.num_embeddings - 1}, found {padding_idx}"
            )
        self.padding_idx = padding_idx
        self.dtype = dtype
        self.register_buffer("rows", table.rows)
        self.register_buffer("affine", table.affine)
        self.register_buffer("remap", table.remap)
        self._settle()

    def check(self) -> None:
        """See `PackedModule.check`."""
        if self.remap.device.type != "meta":
            self.table.check()

    @property
    def table(self) -> RowTable:
        """What the buffers hold."""
        return RowTable(self.rows, self.affine, self.remap, self.embedding_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.table.nbytes

    def dense_weight(self) -> Tensor:
        """The table with all its rows, [num_embeddings, embedding_dim]; +0.0 where pruned."""
        indices = torch.arange(self.num_embeddings, device=self.remap.device)
        return self.table.look_up(indices, self.dtype)

    def extra_repr(self) -> str:
        """Sizes and dtype."""
        kept = f"{len(self.rows)} kept as {self.rows.dtype}"
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {kept}{padding}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Affine parameters are moved like all tensors but never cast: they are seen as integers.
        like = fn(torch.empty(0, dtype=self.dtype, device=self.remap.device))
        if like.dtype not in RESULTS:
            raise TypeError(f"expected a cast to float32 or bfloat16, found {like.dtype}")
        affine, self.affine = self.affine, None
        super()._apply(fn, recurse)
        self.affine = None if affine is None else fn(affine.view(torch.int32)).view(torch.float32)
        self.dtype = like.dtype
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Check the table, then let it in: it may keep other rows."""
        parts: dict[str, Any] = {
            name: state_dict.get(prefix + name) for name in ("rows", "affine", "remap")
        }
        if parts["rows"] is not None and parts["remap"] is not None:
            try:
                found = RowTable(**parts, columns=self.embedding_dim)
                found.check()
                if found.remap.shape != self.remap.shape or found.rows.dtype != self.rows.dtype:
                    raise PackingError(
                        f"a table of {found.remap.numel()} rows of {found.rows.dtype}, "
                        f"expected {self.num_embeddings} of {self.rows.dtype}"
                    )
            except PackingError as error:
                rest[-1].append(f"{prefix[:-1] or type(self).__name__}: {error}")
                return
            for name in ("rows", "affine"):
                own = getattr(self, name)
                if own is not None and own.shape != parts[name].shape:
                    setattr(self, name, own.new_empty(parts[name].shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._settle()

    def _operands(self) -> tuple[Any, ...]:
        """The table as operators take it, and the dtype of results.

        Straight from the dictionary: for few lookups, looking attributes up takes a good part.
        """
        held = self._buffers
        table = held["rows"], held["affine"], held["remap"], self.embedding_dim
        return *table, RESULTS[self.dtype]

    def _run(self, operator: Callable[..., Tensor], indices: Tensor, *rest: Any) -> Tensor:
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"expected indices of int32 or int64, found {indices.dtype}")
        remap: Any = self._buffers["remap"]
        if indices.device != remap.device:
            raise ValueError(f"indices are on {indices.device}, the table is on {remap.device}")
        try:
            return operator(indices, *rest)
        except RuntimeError:  # all that C++ can raise
            check_indices(self._used(indices, *rest), self.num_embeddings)
            raise

    def _used(self, indices: Tensor, *rest: Any) -> Tensor:
        """The indices that an operator reads, of those it is called with."""
        return indices


class RowPrunedEmbedding(_RowPruned):
    """An `nn.Embedding` for inference whose pruned rows take no memory.

    Attributes:
        num_embeddings: rows, the pruned ones included.
        embedding_dim: columns.
        padding_idx: as in `nn.Embedding`; its row is looked up like any other.
        dtype: of results, float32 or bfloat16.
        rows: of the table, see `RowTable`.
        affine: of the table, see `RowTable`.
        remap: of the table, see `RowTable`.
    """

    @classmethod
    def from_dense(cls, source: Tensor | nn.Module, *, bits: int | None = None) -> Self:
        """Leave out the rows that are zero.

        Args:
            source: a weight, [rows, columns], float32 or bfloat16; or an `nn.Embedding`, or its
                quantized form, torch's or ours, whose codes are kept. Rows beyond an
                embedding's `max_norm` are rescaled once.
            bits: 8 or 4 to quantize a float weight by rows; None to keep its values.

        Raises:
            TypeError, ValueError: the source cannot be packed.
        """
        table, dtype = _table_of(source, bits)
        return cls(table, dtype, getattr(source, "padding_idx", None))

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        *,
        bits: int = 8,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ) -> Self:
        """Leave out the rows whose codes all mean zero; see `RowTable.from_codes`."""
        return cls(RowTable.from_codes(codes, scale, zero_point, bits), dtype, padding_idx)

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim].

        Args:
            input: indices, int32 or int64, of any strides.

        Raises:
            IndexError: an index is not in the table. In a compiled program it is a RuntimeError.
            TypeError, ValueError: indices of another dtype or device.
        """
        operator = torch.ops.fx_sparsity.row_pruned_embedding.default
        return self._run(operator, input, *self._operands())


class RowPrunedEmbeddingBag(_RowPruned):
    """An `nn.EmbeddingBag` for inference whose pruned rows take no memory.

    Means count pruned rows; to maxima they are zeros.

    Attributes:
        num_embeddings: rows, the pruned ones included.
        embedding_dim: columns.
        mode: "sum", "mean" or "max".
        padding_idx: an index that bags leave out, or None.
        include_last_offset: whether the offsets end with that of the end.
        dtype: of results, float32 or bfloat16.
        rows: of the table, see `RowTable`.
        affine: of the table, see `RowTable`.
        remap: of the table, see `RowTable`.
    """

    def __init__(
        self,
        table: RowTable,
        dtype: torch.dtype,
        padding_idx: int | None,
        mode: str,
        include_last_offset: bool,
    ) -> None:
        super().__init__(table, dtype, padding_idx)
        if mode not in MODES:
            raise ValueError(f"expected a mode of {', '.join(MODES)}, found {mode!r}")
        self.mode = mode
        self.include_last_offset = include_last_offset

    @classmethod
    def from_dense(
        cls,
        source: Tensor | nn.Module,
        *,
        bits: int | None = None,
        mode: str | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool | None = None,
    ) -> Self:
        """Leave out the rows that are zero.

        Args:
            source: a weight, [rows, columns], float32 or bfloat16; or an `nn.EmbeddingBag`, or its
                quantized form, torch's or ours, whose codes are kept. Rows beyond an
                embedding's `max_norm` are rescaled once.
            bits: 8 or 4 to quantize a float weight by rows; None to keep its values.
            mode: as in `nn.EmbeddingBag`; by default that of `source`.
            padding_idx: likewise.
            include_last_offset: likewise.

        Raises:
            TypeError, ValueError: the source cannot be packed, or an option is unknown.
        """
        table, dtype = _table_of(source, bits)
        given = {
            "mode": mode,
            "padding_idx": padding_idx,
            "include_last_offset": include_last_offset,
        }
        options: dict[str, Any] = {
            "mode": "mean",
            "padding_idx": None,
            "include_last_offset": False,
        }
        if not isinstance(source, Tensor):
            options |= {name: getattr(source, name) for name in options if hasattr(source, name)}
        options |= {name: value for name, value in given.items() if value is not None}
        return cls(table, dtype, **options)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        *,
        bits: int = 8,
        dtype: torch.dtype = torch.float32,
        mode: str = "mean",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> Self:
        """Leave out the rows whose codes all mean zero; see `RowTable.from_codes`."""
        table = RowTable.from_codes(codes, scale, zero_point, bits)
        return cls(table, dtype, padding_idx, mode, include_last_offset)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Bags of indices -> [bags, embedding_dim].

        Args:
            input: indices, int32 or int64: [bags, size], or all bags one after another, [total].
            offsets: where each of the latter begins, int32 or int64.
            per_sample_weights: of the shape of `input`, for sums only; float.

        Raises:
            IndexError: an index is not in the table. In a compiled program it is a RuntimeError.
            ValueError: shapes or devices do not fit; offsets do not begin with 0, or decrease.
            TypeError: a dtype does not fit.
            NotImplementedError: weights in another mode than "sum", as in torch.
        """
        if input.ndim not in (1, 2) or (input.ndim == 1) != (offsets is not None):
            raise ValueError(
                "expected input of two dimensions, or of one with offsets, found "
                f"{list(input.shape)} {'without' if offsets is None else 'with'} offsets"
            )
        if offsets is not None:
            least = int(self.include_last_offset)
            if offsets.ndim != 1 or offsets.shape[0] < least:
                raise ValueError(
                    f"expected offsets of one dimension and {least} or more elements, "
                    f"found {list(offsets.shape)}"
                )
            if offsets.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"expected offsets of int32 or int64, found {offsets.dtype}")
        if per_sample_weights is not None:
            if self.mode != "sum":
                raise NotImplementedError(
                    f"per_sample_weights are for mode 'sum', this module has mode {self.mode!r}"
                )
            if per_sample_weights.shape != input.shape:
                raise ValueError(
                    f"expected per_sample_weights of {list(input.shape)}, "
                    f"found {list(per_sample_weights.shape)}"
                )
            per_sample_weights = per_sample_weights.float()
        return self._run(
            torch.ops.fx_sparsity.row_pruned_embedding_bag.default,
            input,
            offsets,
            per_sample_weights,
            *self._operands(),
            MODES.index(self.mode),
            NO_PADDING if self.padding_idx is None else self.padding_idx,
            self.include_last_offset,
        )

    def _used(self, indices: Tensor, *rest: Any) -> Tensor:
        _, bag = bag_of_positions(indices, rest[0], self.include_last_offset)
        return indices.reshape(-1)[: len(bag)]

    def extra_repr(self) -> str:
        """Sizes, dtype and mode."""
        return f"{super().extra_repr()}, mode={self.mode!r}"


@torch.no_grad()
def _table_of(source: Tensor | nn.Module, bits: int | None) -> tuple[RowTable, torch.dtype]:
    """The table of a weight or a module, and the dtype of what is looked up."""
    if isinstance(source, Tensor):
        return RowTable.from_weight(source, bits), source.dtype
    if bits is not None and isinstance(source, CodedWeight):
        raise ValueError("expected a float weight to quantize, found one of 8-bit codes")
    if isinstance(source, CodedWeight):
        held = source._weight_codes
        return RowTable.from_codes(held.codes, held.scale, held.zero_point), held.dtype
    weight = source.weight() if callable(source.weight) else source.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected a weight in {type(source).__name__}, found {type(weight)}")
    if not weight.is_quantized:
        weight = weight.detach()
        if getattr(source, "max_norm", None) is not None:
            norm_type, max_norm = float(source.norm_type), float(source.max_norm)  # type: ignore[arg-type]
            weight = weight.clone().renorm_(norm_type, 0, max_norm)
        return RowTable.from_weight(weight, bits), weight.dtype
    if bits is not None:
        raise ValueError(f"expected a float weight to quantize, found one of {weight.dtype}")
    affine = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    codes = weight.int_repr()
    if weight.dtype == torch.quint8:
        return RowTable.from_codes(codes, *affine), torch.float32
    if weight.dtype == torch.quint4x2 and weight.shape[1] % 2 == 0:
        codes = torch.stack([codes & 15, codes >> 4], 1).view(weight.shape)
        return RowTable.from_codes(codes, *affine, bits=4), torch.float32
    raise ValueError(
        f"expected codes of quint8, or of quint4x2 in an even number of columns, found "
        f"{weight.dtype} {list(weight.shape)}"
    )
