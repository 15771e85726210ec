"""`prepare`, `step`, `squash`, `unprepare` and `lower`, each a `PassBase`.

What is wrong is raised by `requires`, before anything is changed. A `PassManager` wraps it in an
exception of its own, of which it is the cause.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fx_sparsity.graph import MappingLike, prepare, squash, unprepare
from fx_sparsity.graph.compiled import is_compiled
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.mapping import Assignment
from fx_sparsity.graph.prepare import check_bound, mask_planned
from fx_sparsity.graph.prepare_plan import plan_prepare
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.lowering import LoweringError, LoweringReport, lower
from fx_sparsity.lowering.lower import check_squashed
from fx_sparsity.lowering.policy import AUTO, Rules
from fx_sparsity.sparsifier import BaseSparsifier, Mask, MaskError, SparsityRecord
from fx_sparsity.sparsifier.record import MaskRecord
from fx_sparsity.verification import verify

_Subject = TypeVar("_Subject", fx.GraphModule, ExportedProgram)
_Planned = tuple[fx.GraphModule, tuple[WeightMap, Assignment | None]]
"""A graph, and what `plan_prepare` found there."""


class VerbPass(PassBase):
    """A verb that a `PassManager` calls with a graph, and anyone with a program.

    The graph may be traced, that of `ExportedProgram.module()`, or, for all but `Lower`, the one
    that the backend of `torch.compile` receives from Dynamo.
    """

    @abstractmethod
    def on_program(self, program: ExportedProgram) -> ExportedProgram:
        """The verb on an `ExportedProgram`, which is not changed: signature and state go along."""


class _OfSparsifier(VerbPass):
    """A pass over the masks that a sparsifier has put on the graph."""

    def __init__(self, sparsifier: BaseSparsifier) -> None:
        super().__init__()
        self.sparsifier = sparsifier

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The sparsifier has prepared this graph.

        Raises:
            MaskError: naming its weights that the graph does not hold.
        """
        held: nn.Module = graph_module
        if is_compiled(graph_module) and self.sparsifier.model is not None:
            held = self.sparsifier.model  # the graph receives them as inputs
        check_bound(held, self.sparsifier)


class Prepare(VerbPass):
    """Put masks on the weights of a graph, all ones, as `fx_sparsity.prepare` does.

    Args:
        sparsifier: computes the masks at `Step`; `RecordedMasks` takes them from a record.
        mapping: which weight gets which pattern and level, as `prepare` takes it.
        example_inputs: as `prepare` takes them; of the graph of a backend, what it received.
        model: as `prepare` takes it, for the graph of a backend.
    """

    def __init__(
        self,
        sparsifier: BaseSparsifier,
        mapping: MappingLike | None = None,
        example_inputs: ExampleInputs | None = None,
        *,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.sparsifier = sparsifier
        self.mapping = mapping
        self.example_inputs = example_inputs
        self.model = model
        self._planned: _Planned | None = None

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The graph has the weights that the mapping names, and a mask can stand on them.

        Raises:
            MappingError: as `prepare`.
            MaskError: as `prepare`.
        """
        self._planned = (
            graph_module,
            plan_prepare(
                graph_module, self.sparsifier, self.example_inputs, self.mapping, model=self.model
            ),
        )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """See `PassBase.call`."""
        if self._planned is None or self._planned[0] is not graph_module:
            self.requires(graph_module)
        assert self._planned is not None
        (_, planned), self._planned = self._planned, None
        before = len(self.sparsifier.names)
        mask_planned(graph_module, self.sparsifier, planned, self.example_inputs, self.model)
        return PassResult(graph_module, len(self.sparsifier.names) > before)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well-formed and holds the mask of each of its weights.

        Raises:
            MaskError: naming a weight that has none.
        """
        graph_module.graph.lint()
        masks = {id(m.mask) for m in graph_module.modules() if isinstance(m, Mask)}
        held = {id(tensor) for tensor in graph_module.parameters()}
        for name in self.sparsifier.names:
            live = id(self.sparsifier.get_tensor(name)) in held
            live = live and not self.sparsifier.is_squashed(name)
            if live and id(self.sparsifier.get_mask(name)) not in masks:
                raise MaskError(f"{name}: its mask is not in the graph; prepare this graph anew")

    def on_program(self, program: ExportedProgram) -> ExportedProgram:
        """See `VerbPass.on_program`."""
        return prepare(program, self.sparsifier, self.example_inputs, self.mapping)


class Step(_OfSparsifier):
    """Compute the masks, in place, as `step` does; the graph stays as it is."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """See `PassBase.call`."""
        self.sparsifier.step()
        return PassResult(graph_module, False)

    def on_program(self, program: ExportedProgram) -> ExportedProgram:
        """See `VerbPass.on_program`."""
        check_bound(program, self.sparsifier)
        self.sparsifier.step()
        return program


class Squash(_OfSparsifier):
    """Bake the masks into the weights and take them off, as `fx_sparsity.squash` does.

    Attributes:
        record: of the masks, once the pass has run.
    """

    record: SparsityRecord | None = None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """See `PassBase.call`."""
        live = not all(map(self.sparsifier.is_squashed, self.sparsifier.names))
        graph_module, self.record = squash(graph_module, self.sparsifier)
        return PassResult(graph_module, live)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well-formed, and what was masked is zero in it.

        Raises:
            SparsityLostError: naming the weights.
        """
        graph_module.graph.lint()
        if self.record is not None and not is_compiled(graph_module):
            verify(graph_module, self.record).raise_if_lost()

    def on_program(self, program: ExportedProgram) -> ExportedProgram:
        """See `VerbPass.on_program`."""
        program, self.record = squash(program, self.sparsifier)
        return program


class Unprepare(_OfSparsifier):
    """Take the masks off without a trace, as `fx_sparsity.unprepare` does."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """See `PassBase.call`."""
        return PassResult(unprepare(graph_module, self.sparsifier), True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well-formed, and the sparsifier is fresh.

        Raises:
            MaskError: naming a weight that it still holds.
        """
        graph_module.graph.lint()
        if self.sparsifier.names:
            raise MaskError(f"{self.sparsifier.names[0]} is still held by the sparsifier")

    def on_program(self, program: ExportedProgram) -> ExportedProgram:
        """See `VerbPass.on_program`."""
        return unprepare(program, self.sparsifier)


class Lower(VerbPass):
    """Put sparse kernels in the place of layers where they pay, as `fx_sparsity.lower` does.

    Args:
        policy: as `lower` takes it.
        example_inputs: as `lower` takes them.
        tokens: as `lower` takes them.
        record: as `lower` takes it.

    Attributes:
        report: a row for every weight, once the pass has run.
    """

    report: LoweringReport | None = None

    def __init__(
        self,
        policy: str | Rules = AUTO,
        example_inputs: ExampleInputs | None = None,
        *,
        tokens: Sequence[int] | None = None,
        record: Mapping[str, MaskRecord] | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.example_inputs = example_inputs
        self.tokens = tokens
        self.record = record

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The graph holds its weights, and none of them is masked.

        Raises:
            LoweringError: naming the weights.
        """
        if is_compiled(graph_module):
            raise LoweringError(
                "the graph of a torch.compile backend receives its weights as inputs; lower the "
                'model before it is compiled, or compile with backend="fx_sparsity"'
            )
        check_squashed(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """See `PassBase.call`."""
        graph_module, self.report = self._lowered(graph_module)
        return PassResult(graph_module, bool(self.report.lowered))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well-formed, and what the record masks is zero in what was packed.

        Raises:
            SparsityLostError: naming the weights.
        """
        graph_module.graph.lint()
        if self.record is not None:
            verify(graph_module, self.record).raise_if_lost()

    def on_program(self, program: ExportedProgram) -> ExportedProgram:
        """See `VerbPass.on_program`."""
        program, self.report = self._lowered(program)
        return program

    def _lowered(self, model: _Subject) -> tuple[_Subject, LoweringReport]:
        return lower(
            model, self.example_inputs, self.policy, tokens=self.tokens, record=self.record
        )
