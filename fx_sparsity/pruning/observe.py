"""Without a graph: the operators of a running model, observed below everything that wraps them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fx_sparsity.graph.operators import OPERATORS, SAME_VALUES, Axes, Operator
from fx_sparsity.graph.weight_inputs import UnsupportedUse
from fx_sparsity.pruning.batches import Batch
from fx_sparsity.pruning.padding import without_padding
from fx_sparsity.pruning.pruner import Pruner


@torch.no_grad()
def observe(model: nn.Module, batches: Sequence[Batch], pruner: Pruner) -> dict[str, nn.Parameter]:
    """Run a model, and take in the inputs of its weights.

    A weight is known by its memory, also through views, and is followed through casts, copies,
    masks and picks. What is computed from it in any other way is not seen.

    Args:
        model: in the mode that it is to run in.
        batches: to run.
        pruner: takes the inputs of its weights, or the reason why they cannot be known.

    Returns:
        FQN -> the parameter that its product adds, for weights with one product a batch, of
        parameters that nothing else reads.

    Raises:
        InputError: the model rejects a batch, with its own words.
    """
    biases = Biases(model)
    observer = Observer(pruner.weights, pruner.columns, take_into(pruner), biases)
    for batch in batches:
        observer.batch = batch
        with observer:
            batch.call(model)
    return biases.found


OnUse = Callable[[str, Operator, Mapping[str, Any], str, Tensor, Batch], None]
"""(FQN of a weight, row of the operator that uses it, its arguments, which of them is the weight,
columns of that, the batch of the call) -> nothing."""


def take_into(pruner: Pruner) -> OnUse:
    """Has a pruner take in the inputs of weights, or the reason why they cannot be known."""

    def on_use(
        fqn: str,
        row: Operator,
        args: Mapping[str, Any],
        arg: str,
        columns: Tensor,
        batch: Batch,
    ) -> None:
        assert row.inputs is not None  # others are not observed
        args, note = without_padding(batch.padding, row, arg, args)
        pruner.note(fqn, note)
        try:
            for inputs in row.inputs(args, arg, columns):
                # Lookups in what is no table pick matrices of a stack.
                if (inputs.x is None) == pruner.plans[fqn].table:
                    pruner.take(fqn, inputs, batch.held_out)
        except UnsupportedUse as reason:
            pruner.refuse(fqn, str(reason))

    return on_use


class _Known(NamedTuple):
    """Memory that holds a weight, or what was copied from it.

    Attributes:
        fqn: of the weight.
        columns: of each element, contiguous.
        tensor: whose memory it is; held, so that no other takes its place.
    """

    fqn: str
    columns: Tensor
    tensor: Tensor


class Biases:
    """Which parameter belongs to which weight, batch by batch.

    Attributes:
        found: FQN -> parameter, see `observe`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, nn.Parameter] = {}
        self._parameters = {id(parameter): parameter for parameter in model.parameters()}
        self._not_one: set[str] = set()
        self._reads: Counter[int] = Counter()
        self._added: dict[str, list[int]] = {}

    def read(self, values: Any) -> None:
        """An operator has these arguments."""
        self._reads.update(id(v) for v in pytree.tree_leaves(values) if id(v) in self._parameters)

    def add(self, fqn: str, bias: Any) -> None:
        """The product of a weight adds `bias`."""
        self._added.setdefault(fqn, []).append(id(bias))

    def end_batch(self) -> None:
        """Judge by what one batch has shown."""
        for fqn, added in self._added.items():
            bias = self._parameters.get(added[0])
            alone = bias is not None and len(added) == 1 and self._reads[added[0]] == 1
            if bias is None or not alone or self.found.get(fqn, bias) is not bias:
                self._not_one.add(fqn)
            else:
                self.found[fqn] = bias
        for fqn, bias in list(self.found.items()):
            if fqn in self._not_one or (fqn not in self._added and self._reads[id(bias)]):
                self._not_one.add(fqn)
                del self.found[fqn]
        self._reads.clear()
        self._added.clear()


class Observer(TorchDispatchMode):
    """Sees every ATen operator of a model, one call at a time.

    Args:
        weights: FQN -> tensor of those that are looked for.
        columns: FQN -> see `MatrixForm.columns`.
        on_use: called wherever an operator has a weight for one.
        biases: learns which biases belong to the weights; None where nobody asks.

    Attributes:
        batch: of the next call.
    """

    batch: Batch

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        columns: Callable[[str], Tensor],
        on_use: OnUse,
        biases: Biases | None = None,
    ) -> None:
        super().__init__()
        self._weights, self._columns, self._on_use = weights, columns, on_use
        self._biases = biases
        self._fqns: dict[int, str] = {}
        self._known: dict[int, _Known] = {}

    def __enter__(self) -> "Observer":
        self._fqns = {_memory(tensor): fqn for fqn, tensor in self._weights.items()}
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._known.clear()
        if self._biases is not None:
            self._biases.end_batch()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        name = func._schema.name.rpartition("::")[2]
        row = OPERATORS.get(name)
        if self._biases is not None:
            self._biases.read((args, kwargs))
        if row is not None and row.inputs is not None:
            for arg, value, axes in row.find(bound):
                found = self._find(value)
                if found is not None and _varies(found[1], axes):
                    if self._biases is not None:
                        self._biases.add(found[0], bound.get(row.bias))
                    self._on_use(found[0], row, bound, arg, found[1], self.batch)
        result = func(*args, **kwargs)
        if name in _FOLLOWED and isinstance(result, Tensor):
            self._follow(func, name, args, kwargs, result)
        return result

    def _find(self, value: Any) -> tuple[str, Tensor] | None:
        """(FQN, columns) of a tensor that lies in the memory of a weight."""
        if not isinstance(value, Tensor):
            return None
        place = _memory(value)
        known = self._known.get(place)
        if known is None and place in self._fqns:
            fqn = self._fqns[place]
            weight = self._weights[fqn]
            known = _Known(fqn, _like(weight, self._columns(fqn)), weight)
            self._known[place] = known
        if known is None:
            return None
        offset = value.storage_offset() - known.tensor.storage_offset()
        return known.fqn, known.columns.as_strided(value.shape, value.stride(), offset)

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        for place, arg in enumerate(args):
            found = self._find(arg)
            if found is None or _memory(result) in self._known:
                continue
            columns = found[1]
            if name in _PICKS:
                columns = func(columns, *args[1:], **kwargs)
            if (place == 0 or name == "where") and columns.shape == result.shape:
                self._known[_memory(result)] = _Known(found[0], _like(result, columns), result)


_PICKS = frozenset({"index", "index_select"})
_FOLLOWED = SAME_VALUES | _PICKS | {"where"}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _like(tensor: Tensor, columns: Tensor) -> Tensor:
    """Columns that lie in memory as the elements of a tensor do."""
    return (
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int64)
        .to(columns.device)
        .copy_(columns)
    )


def _varies(columns: Tensor, axes: Axes) -> bool:
    """Whether the axis that an operator reduces is one that the matrix form reduces."""
    for axis, role in axes.items():
        if role in ("in", "row") and axis is not None and columns.shape[axis] > 1:
            first, last = columns.select(axis, 0), columns.select(axis, -1)
            if torch.equal(first, last):
                return False
    return True
