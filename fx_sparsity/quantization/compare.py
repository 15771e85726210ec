"""Which order loses less? Measured on the user's own data, rather than believed."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fx_sparsity.graph import MappingLike, find_weights
from fx_sparsity.graph.example_inputs import ExampleInputs, call_arguments
from fx_sparsity.graph.opaque import expanded
from fx_sparsity.quantization.backend import Backend, Calibrate, get_backend
from fx_sparsity.quantization.flow import Order, sparsify_and_quantize
from fx_sparsity.reports import Table, Tabular
from fx_sparsity.sparsifier import BaseSparsifier
from fx_sparsity.verification.gate import Verification


@dataclass(frozen=True)
class OrderResult:
    """One order, run on the whole model.

    Attributes:
        model: quantized and sparse.
        verification: of its zeros.
        error: how far its outputs are from those of the float model: the norm of the difference
            over the norm, all floating outputs on all the data taken together.
        drift: the same, from those of the model that is quantized alike and dense.
    """

    model: nn.Module
    verification: Verification
    error: float
    drift: float


@dataclass(frozen=True)
class OrderComparison(Tabular, Mapping[Order, OrderResult]):
    """What each order loses.

    Attributes:
        results: by order.
        quantized: the error of the model that is quantized alike, and dense.
    """

    results: Mapping[Order, OrderResult]
    quantized: float

    @property
    def best(self) -> Order:
        """The order with the smallest error, the first of equals."""
        return min(self.results, key=lambda order: self.results[order].error)

    def __getitem__(self, order: Order) -> OrderResult:
        return self.results[order]

    def __iter__(self) -> Iterator[Order]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def tables(self) -> tuple[Table, ...]:
        """What quantizing alone loses, and each order."""
        rows: list[tuple[object, ...]] = [("quantized alone", f"{self.quantized:.4f}", None, None)]
        for order, result in self.results.items():
            zeros = f"{result.verification.share:.1%}"
            rows.append((order, f"{result.error:.4f}", f"{result.drift:.4f}", zeros))
        return (Table(("order", "output error", "drift from quantized alone", "zeros kept"), rows),)

    @property
    def summary(self) -> str:
        """Which order is the best."""
        return f"the least is lost by {self.best}"

    def __str__(self) -> str:
        return f"{self.tables[0]}\n({self.summary})"


@torch.no_grad()
def compare_orders(
    model: nn.Module,
    sparsifier: BaseSparsifier,
    example_inputs: ExampleInputs,
    *,
    backend: str | Backend,
    mapping: MappingLike | None = None,
    data: Iterable[ExampleInputs] | None = None,
    orders: Sequence[Order] = ("sparsify_first", "quantize_first"),
    calibrate: Calibrate | None = None,
    config: Any = None,
    dynamic_shapes: Any = None,
) -> OrderComparison:
    """Run several orders on the same model and data, and say which loses less of the output.

    Either can be better: the weaker perturbation should come first (arXiv 2603.18426), and which
    one that is depends on the model, the pattern and the bits.

    Raises what `sparsify_and_quantize` raises, too.

    Args:
        model: in float, in eval mode, without live masks. Not changed.
        sparsifier: a fresh one; each order works with a copy of it.
        example_inputs: a tuple of positional, or a dict of keyword arguments.
        backend: a name in `BACKENDS`, or a `Backend`.
        mapping: which weight gets which pattern and level; None is the sparsifier's defaults.
        data: inputs to compare outputs on; the example inputs by default.
        orders: which ones, without `"qat"`, whose training changes what is compared.
        calibrate: as `sparsify_and_quantize` takes it.
        config: the backend's own.
        dynamic_shapes: as `torch.export.export` takes it.

    Returns:
        The results by order; `.best` names one, and printing shows a table.

    Raises:
        ValueError: no orders, `"qat"` among them, or a model without a floating output.
    """
    if not orders or "qat" in orders:
        raise ValueError(
            "orders: expected some of sparsify_first, quantize_first, interleaved, "
            f"found {', '.join(orders) or 'none'}"
        )
    chosen = get_backend(backend) if isinstance(backend, str) else backend
    batches = [example_inputs] if data is None else list(data)
    expected = _outputs(model, batches)
    weights = find_weights(model, example_inputs, dynamic_shapes=dynamic_shapes)
    alone = chosen.quantize(
        model,
        example_inputs,
        weights,
        calibrate=calibrate,
        config=config,
        dynamic_shapes=dynamic_shapes,
    )
    quantized = _outputs(alone.model, batches)
    results: dict[Order, OrderResult] = {}
    for order in orders:
        sparse, verification = sparsify_and_quantize(
            model,
            copy.deepcopy(sparsifier),
            example_inputs,
            order=order,
            backend=chosen,
            mapping=mapping,
            calibrate=calibrate,
            config=config,
            dynamic_shapes=dynamic_shapes,
            reference=alone,
        )
        actual = _outputs(sparse, batches)
        error, drift = _error(actual, expected), _error(actual, quantized)
        results[order] = OrderResult(sparse, verification, error, drift)
    return OrderComparison(results, _error(quantized, expected))


def _outputs(model: nn.Module, batches: Sequence[ExampleInputs]) -> Tensor:
    """All floating outputs, in one vector of float64; what a cache holds, too, as in graphs."""
    values = []
    for batch in batches:
        args, kwargs = call_arguments(batch)
        values += [
            leaf.dequantize().double().flatten() if leaf.is_quantized else leaf.double().flatten()
            for leaf in pytree.tree_leaves(expanded(model(*args, **kwargs)))
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_quantized)
        ]
    if not values:
        raise ValueError(f"{type(model).__name__} has no floating output to compare")
    return torch.cat(values)


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
