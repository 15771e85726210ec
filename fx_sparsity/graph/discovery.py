"""`find_weights`: every weight of a model, read off its graph."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from fx_sparsity.graph.compiled import is_compiled
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.frontends import (
    Frontend,
    Model,
    frontends,
)
from fx_sparsity.graph.operators import OPERATORS
from fx_sparsity.graph.sources import (
    Source,
    attribute_modules,
    attribute_tensors,
    exported_tensors,
    graph_source,
    module_source,
    named_tensors,
    place_of,
)
from fx_sparsity.graph.uses import (
    Consumption,
    canonical_fqn,
    module_uses,
    uses_of_module,
    weight_uses,
)
from fx_sparsity.graph.weight_map import DenseParameter, Reason, Use, WeightMap, WeightSite


def find_weights(
    subject: Model,
    example_inputs: ExampleInputs | None = None,
    *,
    dynamic_shapes: Any = None,
    model: nn.Module | None = None,
) -> WeightMap:
    """Find every weight that a linear, embedding, convolution or matmul-like operator consumes.

    A module is captured with `torch.export`. Where that fails, its graphs come from Dynamo; what
    they do not show, from a symbolic trace; and what is then still open, from the classes of its
    modules. `WeightMap.frontend` tells which were needed. Without example inputs the classes
    alone are looked at. Weights are parameters. What acts as one without being a parameter, such as
    a buffer or a layer in a plain list, cannot be masked as one, and is among what stays dense.

    Args:
        subject: a module; or, read as they are: an `fx.GraphModule`, an `ExportedProgram`, or the
            graph that a `torch.compile` backend receives. Not changed.
        example_inputs: a tuple of positional, or a dict of keyword arguments. For the graph of a
            backend: the list that the backend received with Dynamo's graph. The graphs that
            AOTAutograd and Inductor make of it take that one, too, or `model` alone.
        dynamic_shapes: as `torch.export.export` takes it; only for a module.
        model: whose parameters are placeholders of a backend's graph. Without it their names are
            those that Dynamo noted. Of a graph with a backward pass in it, only what leads to the
            forward's results counts.

    Returns:
        The sites in graph order, and every tensor of two or more dimensions that is none.

    Raises:
        InputError: the module rejects `example_inputs`.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        >>> weights = fxs.find_weights(model, (torch.arange(3),))
        >>> for fqn, site in weights.items():
        ...     print(fqn, site.kind, site.roles)
        0.weight embedding ('row', 'dim')
        1.weight linear ('out', 'in')
    """
    search = _Search.of(subject, example_inputs, model)
    return search.through(frontends(subject, example_inputs, dynamic_shapes, model))


def read_graph(model: nn.Module, graph: fx.GraphModule) -> WeightMap:
    """The map of a module, where the graph that was exported of it is at hand.

    Args:
        model: the module, which tells names and owners.
        graph: its `torch.export.export(...).module()`.
    """
    return _Search.of(model).through([Frontend("torch.export", [(graph, module_source(graph))])])


@dataclass
class _Search:
    """What is known so far about the tensors of a model.

    Attributes:
        tensors: by FQN.
        parameters, buffers: which of them are that.
        model: tells the classes of owners; None where there are no modules.
        uses: canonical FQN -> (kind, use, whether its operator is the same for all inputs).
        reasons: canonical FQN -> why consumers did not count as uses.
        constants: tensors that act as weights, but are no parameters; with the operators concerned.
    """

    tensors: Mapping[str, Tensor]
    parameters: set[str]
    buffers: set[str]
    model: nn.Module | None
    uses: dict[str, list[tuple[str, Use, bool]]] = field(default_factory=dict)
    reasons: dict[str, set[tuple[Reason, str]]] = field(default_factory=dict)
    constants: dict[str, tuple[Tensor, set[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first: dict[int, str] = {}
        self.canonical = {fqn: first.setdefault(id(t), fqn) for fqn, t in self.tensors.items()}
        self.aliases: dict[str, list[str]] = {}
        for fqn, name in self.canonical.items():
            if name != fqn:
                self.aliases.setdefault(name, []).append(fqn)

    @classmethod
    def of(
        cls,
        subject: Model,
        example_inputs: ExampleInputs | None = None,
        model: nn.Module | None = None,
    ) -> "_Search":
        """A search among the tensors of a model; see `find_weights` for the arguments."""
        if isinstance(subject, ExportedProgram):
            signature = subject.graph_signature
            names = set(signature.parameters), set(signature.buffers)
            return cls(exported_tensors(subject), *names, None)
        if isinstance(subject, fx.GraphModule) and is_compiled(subject) and model is None:
            source = graph_source(subject, example_inputs, None)
            found = dict(filter(None, map(source, subject.graph.nodes)))
            parameters = {name for name, held in found.items() if isinstance(held, nn.Parameter)}
            return cls(found, parameters, found.keys() - parameters, None)
        held_by = model if isinstance(subject, fx.GraphModule) and is_compiled(subject) else subject
        assert held_by is not None
        parameters = {name for name, _ in held_by.named_parameters(remove_duplicate=False)}
        registered = dict(named_tensors(held_by))
        tensors = registered | attribute_tensors(held_by)
        return cls(tensors, parameters, registered.keys() - parameters, held_by)

    def through(self, ways: Iterable[Frontend]) -> WeightMap:
        """Look in one way after the other, until nothing is open any more."""
        names, gaps = [], ""
        for way in ways:
            names.append(way.name)
            gaps = way.gaps
            self.read(way)
            if not self.open():
                break
        return self.result(", ".join(names), gaps)

    def read(self, way: Frontend) -> None:
        """Take in the uses that one way of looking shows, of whatever is not settled yet."""
        wanted = self.open()
        for gm, source in way.graphs:
            self._read(gm, source, wanted)
        if way.classes is not None:
            for path, module in way.classes.named_modules():
                self.take(uses_of_module(path, module), wanted)
            for path, module in attribute_modules(way.classes).items():
                for name, kind, _ in uses_of_module(path, module):
                    self._take_constant(name, module.get_parameter(name[len(path) + 1 :]), kind)

    def _read(self, gm: fx.GraphModule, source: Source, wanted: set[str]) -> None:
        seeds: dict[str, Tensor] = {}
        constants: list[tuple[str, Consumption, Use]] = []
        settled: set[tuple[fx.Node, str]] = set()  # arguments that show a parameter
        for found in weight_uses(gm.graph, self._named(source, seeds)):
            fqn = self.canonical.get(found.origin.fqn, found.origin.fqn)
            use = found.use()
            if fqn in self.parameters:
                settled.add((found.node, found.arg))
            if fqn in wanted or (found.origin.dequantized and seeds[found.origin.fqn].ndim >= 2):
                if use is not None:
                    kind = OPERATORS[use.op].kind
                    inner = found.constant and not found.origin.is_factor
                    self.uses.setdefault(fqn, []).append((kind, use, inner))
                else:
                    self.reasons.setdefault(fqn, set()).add(found.reason())
            elif use is not None and not found.constant and fqn not in self.parameters:
                constants.append((fqn, found, use))
        for fqn, found, use in constants:
            if (found.node, found.arg) not in settled:
                self._take_constant(fqn, seeds[found.origin.fqn], OPERATORS[use.op].kind)
        self.take(module_uses(gm.graph, gm), wanted)
        for fqn, name in _inside_leaves(gm).items():
            if self.canonical.get(fqn) in wanted - self.uses.keys():
                reason = (Reason.FRONTEND, f"inside {name}")
                self.reasons.setdefault(self.canonical[fqn], set()).add(reason)

    def _named(self, source: Source, seeds: dict[str, Tensor]) -> Source:
        """A source with the model's own names for what a capture lifted; `seeds` gets tensors."""
        places = {place_of(tensor): name for name, tensor in reversed([*self.tensors.items()])}

        def named(node: fx.Node) -> tuple[str, Tensor] | None:
            if (found := source(node)) is None:
                return None
            name, tensor = found
            if name not in self.tensors and (place := place_of(tensor)) is not None:
                name = places.get(place, name)
                tensor = self.tensors.get(name, tensor)
            seeds[name] = tensor
            return name, tensor

        return named

    def _take_constant(self, fqn: str, tensor: Tensor, kind: str) -> None:
        """Note that something acts as a weight that is no parameter of the model.

        What is looked up in buffers is mostly positions, and what has one axis only, frequencies.
        """
        table = kind == "lookup" and not isinstance(tensor, nn.Parameter)
        axes = sum(size > 1 for size in tensor.shape)
        if tensor.is_floating_point() and axes >= 2 and not table:
            self.constants.setdefault(fqn, (tensor, set()))[1].add(kind)

    def take(self, uses: Iterable[tuple[str, str, Use]], wanted: set[str]) -> None:
        """Take in uses by name."""
        for name, kind, use in uses:
            if (fqn := self.canonical[name]) in wanted:
                self.uses.setdefault(fqn, []).append((kind, use, False))

    def open(self) -> set[str]:
        """Parameters of two or more dimensions that are neither a weight nor explained."""
        return {
            fqn
            for fqn in self.parameters
            if self.canonical[fqn] == fqn
            and self.tensors[fqn].ndim >= 2
            and fqn not in self.uses
            and not self._explained(fqn)
        }

    def _explained(self, fqn: str) -> bool:
        reasons = self.reasons.get(fqn, set())
        return bool(reasons) and all(reason.explained for reason, _ in reasons)

    def result(self, frontend: str, incomplete: str = "") -> WeightMap:
        """The map.

        Args:
            frontend: where it was read from.
            incomplete: why the graphs may not show every parameter, if that is so.
        """
        unseen = (Reason.FRONTEND, incomplete) if incomplete else (Reason.UNREACHABLE, "")
        modules = {} if self.model is None else dict(self.model.named_modules())
        dense = [
            self._dense_parameter(fqn, unseen)
            for fqn, tensor in self.tensors.items()
            if fqn in self.parameters
            and self.canonical[fqn] == fqn
            and fqn not in self.uses
            and tensor.ndim >= 2
        ]
        dense += [self._constant(fqn, *found) for fqn, found in self.constants.items()]
        vectors = sum(
            self.tensors[fqn].ndim < 2 and self.canonical[fqn] == fqn for fqn in self.parameters
        )
        sites = tuple(self._site(fqn, modules) for fqn in self.uses)
        return WeightMap(sites, tuple(dense), vectors, frontend)

    def _site(self, fqn: str, modules: Mapping[str, nn.Module]) -> WeightSite:
        # A spectral norm multiplies its weight by a vector on the way to the layer that counts.
        found = [f for f in self.uses[fqn] if not f[2]] or self.uses[fqn]
        tensor, name = self.tensors[fqn], canonical_fqn(fqn)
        owner = modules.get(canonical_fqn(fqn).rpartition(".")[0])
        holder = None if owner is None else parametrize.type_before_parametrizations(owner)
        return WeightSite(
            fqn=name,
            aliases=tuple(canonical_fqn(alias) for alias in self.aliases.get(fqn, ())),
            owner=name.rpartition(".")[0],
            owner_type=f"{holder.__module__}.{holder.__qualname__}" if holder else "",
            kind=found[0][0],
            roles=found[0][1].roles,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            uses=tuple(use for _, use, _ in found),
        )

    def _constant(self, fqn: str, tensor: Tensor, kinds: set[str]) -> DenseParameter:
        reason = Reason.BUFFER if fqn in self.buffers else Reason.CONSTANT
        return DenseParameter(fqn, tuple(tensor.shape), reason, ", ".join(sorted(kinds)))

    def _dense_parameter(self, fqn: str, unseen: tuple[Reason, str]) -> DenseParameter:
        tensor, name = self.tensors[fqn], canonical_fqn(fqn)
        shape = tuple(tensor.shape)
        if not tensor.is_floating_point():
            return DenseParameter(name, shape, Reason.NOT_FLOATING, str(tensor.dtype))
        reasons = self.reasons.get(fqn) or {unseen}
        # The reason that leaves most open counts: being scaled here does not settle a use there.
        for reason in (Reason.FRONTEND, Reason.OPERATOR, Reason.SCALE, Reason.ADDED):
            if details := sorted(detail for found, detail in reasons if found is reason):
                return DenseParameter(name, shape, reason, ", ".join(filter(None, details)))
        return DenseParameter(name, shape, Reason.UNREACHABLE)


def _inside_leaves(gm: fx.GraphModule) -> dict[str, str]:
    """FQN -> class of the called module, for parameters of modules that the graph does not open."""
    return {
        name: type(module).__name__
        for node in gm.graph.find_nodes(op="call_module")
        for module in [gm.get_submodule(str(node.target))]
        for name, _ in module.named_parameters(prefix=str(node.target))
    }
