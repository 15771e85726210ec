"""Where a model holds layers that may be lowered: modules, and nodes of graphs."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_sparsity.graph.example_inputs import ExampleInputs, InputError, run_undisturbed
from fx_sparsity.graph.sources import Source
from fx_sparsity.graph.uses import SeenWeight
from fx_sparsity.lowering.dense_tables import DenseTable, Lookup, holds_table, read_table
from fx_sparsity.lowering.layers import KINDS, DenseLinear, computed_or_hooked, kind_of, read_module
from fx_sparsity.lowering.lowered import ByTokens, LoweredLinear, OriginalModule

TABLE = "table"
"""Kind of the modules that hold embedding tables, besides `layers.KINDS`."""
_COMMON = frozenset(
    {
        "bias",
        "in_features",
        "out_features",
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "mode",
    }
)
"""Attributes that a layer and its lowered form share."""


@dataclass(eq=False)
class Place(ABC):
    """One layer of a model: a linear one, or an embedding table.

    Attributes:
        names: every FQN of its weight, at this place.
        owner: class that holds the weight.
        tensor: the weight itself, by which ties are known.
        obstacle: what is known to speak against lowering it, besides what `read` finds.
        tokens, dtypes: of its calls, as far as they are known.
    """

    names: tuple[str, ...]
    owner: type[nn.Module]
    tensor: Any
    obstacle: str = ""
    tokens: set[int] = field(default_factory=set)
    dtypes: set[torch.dtype] = field(default_factory=set)

    @property
    def fqn(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def transposed(self) -> bool:
        """Whether the model stores the weight, or what is seen of it here, as [in, out]."""
        return False

    @property
    def view(self) -> SeenWeight | None:
        """What is seen of the weight here; None where that is the weight itself."""
        return None

    @abstractmethod
    def look(self) -> DenseLinear | DenseTable | str:
        """The layer; or, in words, why it cannot be replaced."""

    def against(self, layer: DenseLinear | DenseTable) -> str:
        """Why the layer that was found here cannot be replaced; empty if it can."""
        if self.obstacle:
            return self.obstacle
        devices = ("cpu", "cuda") if isinstance(layer, DenseLinear) else ("cpu",)
        if (device := layer.device.type) not in devices:
            return f"no kernel for {device}"
        if strange := sorted(str(dtype) for dtype in self.dtypes if not layer.takes(dtype)):
            return f"no kernel for inputs of {', '.join(strange)}"
        return ""

    @property
    def nbytes(self) -> int:
        """Of a weight that cannot be read, as far as that is known."""
        if not isinstance(self.tensor, torch.Tensor):
            return 0
        if is_traceable_wrapper_subclass(self.tensor):
            names, _ = self.tensor.__tensor_flatten__()
            return sum(getattr(self.tensor, name).nbytes for name in names)
        return self.tensor.nbytes


@dataclass(eq=False)
class GraphPlace(Place):
    """A node of a graph.

    Attributes:
        node: the node.
        seen: what it sees of the weight.
        source: tells the tensors that nodes stand for.
    """

    node: fx.Node = field(kw_only=True)
    seen: SeenWeight = field(kw_only=True)
    source: Source = field(kw_only=True)

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Names of the arguments that what takes its place is called with."""

    @property
    @abstractmethod
    def weight(self) -> fx.Node:
        """The argument that is the weight."""

    @property
    def result(self) -> fx.Node | None:
        """The node that stands for what it computes; None where more is read of it."""
        return self.node


@dataclass(eq=False)
class ModulePlace(Place):
    """A module of a known kind.

    Attributes:
        module: as it is in the model.
        kind: of `layers.KINDS`, or `TABLE`.
    """

    module: nn.Module = field(kw_only=True)
    kind: str = field(kw_only=True)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every FQN of the module."""
        return tuple(name.rpartition(".")[0] for name in self.names)

    @property
    def transposed(self) -> bool:
        """See `Place`."""
        return self.kind != TABLE and KINDS[self.kind].transposed

    def look(self) -> DenseLinear | DenseTable | str:
        """See `Place`."""
        if obstacle := computed_or_hooked(self.module):
            return obstacle
        if self.kind == TABLE:
            return read_table(self.module)
        return read_module(self.module, self.kind)

    def original(self, tied: nn.Parameter | None = None) -> OriginalModule:
        """What a packed layer keeps of the module, so that `unlower` can build it again.

        Args:
            tied: its weight, where another module holds it, too.
        """
        return OriginalModule(self.kind, KINDS[self.kind].template(self.module), tied)

    def put(self, model: nn.Module, module: nn.Module) -> nn.Module:
        """Put `module` here in the model, under every path.

        Returns:
            The model, which is `module` where that was its root.
        """
        for path in self.paths:
            model = replaced(model, path, module)
        return model


def module_places(model: nn.Module) -> Iterator[ModulePlace]:
    """The modules of a model that are of a known kind, each once."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    fused: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _READS_ITS_CHILDREN):
            fused.update(map(id, module.modules()))
        found.setdefault(id(module), (module, []))[1].append(f"{path}.weight".removeprefix("."))
    for module, names in found.values():
        if (kind := TABLE if holds_table(module) else kind_of(module)) is not None:
            tensor = module._parameters.get("weight", module)
            obstacle = "its weight is read by the module around it" if id(module) in fused else ""
            yield ModulePlace(
                tuple(names), type(module), tensor, obstacle, module=module, kind=kind
            )


_READS_ITS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def watch(model: nn.Module, places: list[ModulePlace], example_inputs: ExampleInputs) -> None:
    """Run a model on its example inputs, and note the inputs of each place.

    Modules that are not called, or whose weight other code reads, get an obstacle.

    Raises:
        InputError: the model rejects the inputs.
    """
    watched = [
        (place, _Watched(place.module, place.kind == TABLE))
        for place in places
        if not place.obstacle
    ]
    subject = model
    try:
        for place, watcher in watched:
            subject = place.put(subject, watcher)
        run_undisturbed(subject, example_inputs)
    finally:
        for place, _ in watched:
            subject = place.put(subject, place.module)
    for place, watcher in watched:
        place.tokens, place.dtypes = watcher.tokens, watcher.dtypes
        if watcher.read:
            place.obstacle = f"the model's own code reads its {', '.join(sorted(watcher.read))}"
        elif watcher.keywords:
            place.obstacle = "it is called with keyword arguments"
        elif not watcher.tokens:
            place.obstacle = "example_inputs never reach it"


class _Watched(nn.Module):
    """Stands in for a module, and notes what it is called with and which attributes are read."""

    def __init__(self, module: nn.Module, table: bool) -> None:
        super().__init__()
        self.module = module
        self.table = table
        self.keywords = False
        self.tokens: set[int] = set()
        self.dtypes: set[torch.dtype] = set()
        self.read: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        self.tokens.add(x.numel() if self.table else x.shape[:-1].numel())
        self.dtypes.add(x.dtype)
        self.keywords = self.keywords or (bool(kwargs) and not self.table)
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("module"), name)
            if name not in _COMMON:
                self.read.add(name)
            return value


def put_modules(
    model: nn.Module,
    packed: Sequence[tuple[ModulePlace, LoweredLinear | Lookup, int | None]],
    example_inputs: ExampleInputs | None,
) -> nn.Module:
    """Put packed modules in their places; and the others back, if the model does not run then.

    Args:
        model: changed in place.
        packed: each with its place, and the most tokens that it takes, where the dense form is
            kept for more.
        example_inputs: to try; None not to.

    Returns:
        The model, which is another module where its root was replaced.

    Raises:
        InputError: the model does not run; nothing was changed.
    """
    for place, new, limit in packed:
        module: nn.Module = new
        if limit is not None:
            assert isinstance(new, LoweredLinear)
            module = ByTokens(place.module, new, limit)
        model = place.put(model, module.train(place.module.training))
    held = {id(parameter) for parameter in model.parameters()}
    for place, new, _ in packed:
        if isinstance(new, LoweredLinear):
            new.original = place.original(place.tensor if id(place.tensor) in held else None)
    try:
        if packed and example_inputs is not None:
            run_undisturbed(model, example_inputs)
    except InputError:
        for place, _, _ in packed:
            model = place.put(model, place.module)
        raise
    return model


def replaced(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put `module` at `path`, in place.

    Returns:
        The model, which is `module` where that was its root.
    """
    if not path:
        return module
    model.set_submodule(path, module)
    return model
