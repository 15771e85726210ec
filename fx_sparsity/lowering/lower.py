"""The verbs `lower` and `unlower`: sparse kernels where they pay, and back."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fx_sparsity.graph import InputError, WeightMap, find_weights
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.kernels.semi_structured import is_semi_structured, to_dense
from fx_sparsity.lowering.dense_tables import Lookup, dense_table
from fx_sparsity.lowering.graph_places import node_places, program_places, watch_nodes
from fx_sparsity.lowering.layers import KINDS, DenseLinear
from fx_sparsity.lowering.lowered import ByTokens, LoweredLinear
from fx_sparsity.lowering.packed_saving import refuse_packed
from fx_sparsity.lowering.places import (
    GraphPlace,
    ModulePlace,
    Place,
    module_places,
    put_modules,
    replaced,
    watch,
)
from fx_sparsity.lowering.plan import (
    Bytes,
    Planned,
    choose,
    layer_rows,
    multiplied_as_floats,
    other_rows,
    pack_all,
    ties,
)
from fx_sparsity.lowering.policy import AUTO, LoweringError, Policy, Rules, checked_tokens
from fx_sparsity.lowering.report import LoweringReport
from fx_sparsity.lowering.rewrite import LowerNodes, lower_program
from fx_sparsity.sparsifier.hub_refusals import REFUSALS, guard_saving
from fx_sparsity.sparsifier.mask import masked_weights
from fx_sparsity.sparsifier.record import MaskRecord
from fx_sparsity.verification.gate import verify

_log = logging.getLogger(__name__)
_Subject = TypeVar("_Subject", bound=nn.Module | ExportedProgram)

REFUSALS.append(refuse_packed)


def lower(
    model: _Subject,
    example_inputs: ExampleInputs | None = None,
    policy: str | Rules = AUTO,
    *,
    tokens: Sequence[int] | None = None,
    keep_dense: bool = False,
    record: Mapping[str, MaskRecord] | None = None,
) -> tuple[_Subject, LoweringReport]:
    """Put sparse kernels in the place of layers where they pay; for inference.

    Linear layers are replaced: `nn.Linear`, the `Conv1D` of transformers, those that torchao or
    `torch.ao` have quantized to 8 bits; embeddings and bags with rows of zeros, quantized or not;
    and in graphs the nodes that compute any of these. On CUDA linear layers with 2:4 weights are,
    in float16, bfloat16, and int8 or float8 with quantized activations. Call it before
    `torch.compile`, `torch.export` and AOTInductor, which take what it returns.

    Whatever is raised, nothing was changed.

    Args:
        model: sparse already, and quantized or not; changed in place. An ExportedProgram is not
            changed, nor is the model that it came from.
        example_inputs: as the model will be called: a tuple of positional, or a dict of keyword
            arguments. They tell the number of tokens in each layer's inputs, and which layers are
            used otherwise than by calling them. Without them modules are judged by their classes.
        policy: `"auto"` lowers where it measured faster than dense on this machine, beyond the
            noise; `"always"` wherever a kernel takes fewer bytes; the name of a packing, of which
            `"nm"` is the one for 2:4 on CUDA, too; or a mapping of rules, see `Policy`:
            `{"head": None, "re:.*mlp.*": "bitmask", nn.Linear: "auto"}`.
        tokens: rows of activations in a call, to measure with. Read off the example inputs by
            default; one without them. `"auto"` wants all of them to be faster.
        keep_dense: keep a module's dense form beside the packed one where more tokens favour it,
            and choose at each call.
        record: of the masks; what no longer holds in the model is an error.

    Returns:
        The model, which is another module where its root was replaced; and the report, with a row
        for every weight.

    Raises:
        LoweringError: live masks, an unknown rule, one that names nothing, a packing that a
            weight cannot have, or a model that does not run lowered.
        SparsityLostError: the model does not match `record`.
        InputError: the model rejects `example_inputs`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> model[0].weight.data[:, ::2] = 0
        >>> model, report = fxs.lower(model, (torch.randn(1, 64),), policy="always")
        >>> report.lowered, report.dense
        (('0.weight',), {'2.weight': 'not sparse enough: bitmask takes 17000 bytes, dense 16384'})
    """
    rules = Policy(policy)
    counts = checked_tokens(tokens)
    module = model.module() if isinstance(model, ExportedProgram) else model
    check_squashed(module)
    if record is not None:
        verify(model, record).raise_if_lost()
    weights = find_weights(model, example_inputs)
    if isinstance(model, ExportedProgram):
        planned = choose(list(program_places(model)), rules, counts)
        _check_used(rules)
        packed = pack_all(planned)
        report = _report(planned, packed, module, weights)
        return lower_program(model, _of_nodes(packed)), report  # type: ignore[return-value]
    modules = list(module_places(model))
    if modules and example_inputs is not None:
        watch(model, modules, example_inputs)
    nodes = _nodes(model, example_inputs)
    planned = choose([*modules, *nodes], rules, counts, keep_dense)
    _check_used(rules)
    packed = pack_all(planned)
    report = _report(planned, packed, model, weights)
    return _put(model, planned, packed, example_inputs), report  # type: ignore[return-value]


def unlower(model: nn.Module) -> nn.Module:
    """Undo `lower`: dense layers, exact for every kept value, with +0.0 for the others.

    Linear layers are of the class that they had, quantized ones with the same codes and scales.
    What were nodes of a graph are `nn.Linear` modules, and tables are `nn.Embedding` or
    `nn.EmbeddingBag`, whose weights are the values of the codes.

    Args:
        model: changed in place.

    Returns:
        The model, which is another module where its root was lowered.

    Raises:
        LoweringError: an ExportedProgram; `lower` has left the one that it was given as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> model[0].weight.data[:, ::2] = 0
        >>> lowered, _ = fxs.lower(model, (torch.randn(1, 64),), policy="nm")
        >>> lowered[0].packing
        'nm'
        >>> fxs.unlower(lowered)[0]
        Linear(in_features=64, out_features=64, bias=True)
    """
    if isinstance(model, ExportedProgram):
        raise LoweringError(
            "unlower: expected a module, found an ExportedProgram; lower makes another one of it, "
            "so keep the program that it was given, or export the model once it is unlowered"
        )
    dense: dict[int, nn.Module] = {}
    tied: dict[int, DenseLinear] = {}
    kept: set[int] = set()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, ByTokens):
            kept.add(id(module.packed))
            model = replaced(model, path, module.dense)
        elif isinstance(module, LoweredLinear) and id(module) not in kept:
            if id(module) not in dense:
                dense[id(module)] = _restored(module, tied)
            model = replaced(model, path, dense[id(module)])
        elif isinstance(module, RowPrunedEmbedding | RowPrunedEmbeddingBag):
            if id(module) not in dense:
                dense[id(module)] = dense_table(module)
            model = replaced(model, path, dense[id(module)])
        elif is_semi_structured(weight := getattr(module, "weight", None)):
            module.weight = nn.Parameter(to_dense(weight), requires_grad=False)
    guard_saving(model)
    return model


def _restored(packed: LoweredLinear, tied: dict[int, DenseLinear]) -> nn.Module:
    """The module that a packed layer stands for.

    Args:
        packed: the layer.
        tied: what was restored so far, by the packed part that tied layers share.
    """
    part = id(next(iter(packed.parts().values())))
    layer = DenseLinear.unpack(packed)
    if part in tied:
        layer = replace(layer, weight=tied[part].weight)
    original = packed.original
    if original is None:
        values = packed.dense_weight()
        linear = nn.Linear(packed.in_features, packed.out_features, device="meta")
        linear.weight = nn.Parameter(values, requires_grad=False)
        linear.register_parameter("bias", packed.bias)
        return linear.train(packed.training)
    if original.tied is not None and torch.equal(original.tied.detach(), layer.weight):
        layer = replace(layer, weight=original.tied)
    module = KINDS[original.kind].restore(original.template, layer)
    restored = module._parameters.get("weight")
    tied[part] = layer if restored is None else replace(layer, weight=restored)
    return module.train(packed.training)


def _report(
    planned: Sequence[Planned],
    packed: Mapping[Place, LoweredLinear | Lookup],
    model: nn.Module,
    weights: WeightMap,
) -> LoweringReport:
    before, after = Bytes(), Bytes()
    rows = layer_rows(planned, packed, before, after)
    rows += other_rows(planned, model, weights, before, after)
    return LoweringReport(tuple(rows), (*multiplied_as_floats(planned), *ties(planned, weights)))


def _put(
    model: nn.Module,
    planned: Sequence[Planned],
    packed: Mapping[Place, LoweredLinear | Lookup],
    example_inputs: ExampleInputs | None,
) -> nn.Module:
    """Replace modules and nodes.

    Raises:
        LoweringError: the model does not run then; nothing was changed.
    """
    up_to = {plan.place: plan.choice.up_to for plan in planned}
    modules = [
        (place, new, up_to[place])
        for place, new in packed.items()
        if isinstance(place, ModulePlace)
    ]
    try:
        model = put_modules(model, modules, example_inputs)
    except InputError as error:
        raise LoweringError(f"the model does not run when it is lowered: {error}") from error
    if nodes := _of_nodes(packed):
        assert isinstance(model, fx.GraphModule)
        LowerNodes(nodes)(model)
    if packed:
        guard_saving(model)
    return model


def _nodes(model: nn.Module, example_inputs: ExampleInputs | None) -> list[GraphPlace]:
    """Places of a graph, with the inputs that they are called with; none of other modules."""
    if not isinstance(model, fx.GraphModule):
        return []
    places = list(node_places(model))
    if example_inputs is not None:
        watch_nodes(model, places, example_inputs)
    return places


def _of_nodes(
    packed: Mapping[Place, LoweredLinear | Lookup],
) -> dict[GraphPlace, LoweredLinear | Lookup]:
    return {place: new for place, new in packed.items() if isinstance(place, GraphPlace)}


def check_squashed(model: nn.Module) -> None:
    """Raise `LoweringError`, naming the weights, where masks are live."""
    if masked := masked_weights(model):
        raise LoweringError(f"{', '.join(masked)} still masked: squash before lowering")


def _check_used(rules: Policy) -> None:
    if unused := rules.unused():
        raise LoweringError(f"policy: {', '.join(map(repr, unused))} names no layer of the model")
