"""The weights of a checkpoint, by a model or by names and shapes, and a mapping applied to them."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.checkpoints.names import why_dense
from fx_sparsity.graph import MappingLike, SparsityMapping, WeightMap, WeightSite, find_weights
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.mapping import Assignment
from fx_sparsity.graph.weight_map import DenseParameter, Reason
from fx_sparsity.patterns import Role

_EMBEDDING = re.compile(r"(?:.*[._])?(?:\w*embed\w*|wte|wpe)(?:[._].*)?", re.IGNORECASE)

Roles = Mapping[str, Sequence[Role]]
"""Regular expression over names -> roles of the axes; the first that matches from the start."""


def weights_on_meta(model: nn.Module, example_inputs: ExampleInputs | None = None) -> WeightMap:
    """What `find_weights` says of a model whose parameters need no data.

    Args:
        model: not changed; where a parameter is on the meta device, a copy of it is looked at that
            is there as a whole.
        example_inputs: as `find_weights` takes them, on any device.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model = copy.deepcopy(model).to("meta")
        example_inputs = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), example_inputs)
    return find_weights(model, example_inputs)


def find_checkpoint_weights(
    checkpoint: Checkpoint, roles: Roles | None = None, known: WeightMap | None = None
) -> WeightMap:
    """The weights of a checkpoint, as a model has them, or else by names and shapes.

    Without a model, a floating matrix is an `embedding` (row, dim) where its name says so (`embed`,
    `wte`, `wpe`), else `linear` (out, in); four axes are those of a `conv`. What three axes mean,
    and whether a matrix is stored the other way round, only `roles` can say.

    Args:
        checkpoint: its tensors.
        roles: regular expression -> roles; wins over everything else.
        known: weights of a model; a tensor of another name is judged by that and by its shape.

    Raises:
        CheckpointError: a tensor has another shape than in the model, or none has a name there.
    """
    told = _Told(checkpoint, known)
    aliases: dict[str, list[str]] = {}
    for alias, other in checkpoint.ties.items():
        aliases.setdefault(other, []).append(alias)
    sites: list[WeightSite] = []
    dense: list[DenseParameter] = []
    vectors = 0
    for name, shard in checkpoint.where.items():
        file = checkpoint.files[shard]
        if name in file.same_as:
            continue  # an alias of another one
        dtype, shape = file.dtype_and_shape(name)
        by_name = any(re.match(regex, name) for regex in roles or {})
        if not by_name and dtype.is_floating_point and (found := told.by_model(name)) is not None:
            (sites if isinstance(found, WeightSite) else dense).append(found)  # type: ignore[arg-type]
            continue
        kind, axes = _axes(name, shape, roles or {})
        if not dtype.is_floating_point:
            dense.append(DenseParameter(name, shape, Reason.NOT_FLOATING))
        elif axes is not None:
            owner = name.rpartition(".")[0]
            names, text = tuple(aliases.get(name, ())), str(dtype)[6:]
            sites.append(WeightSite(name, names, owner, "", kind, axes, shape, text, ()))
        elif len(shape) < 2:
            vectors += 1
        else:
            detail = f"{len(shape)} axes, whose roles the name does not tell"
            dense.append(DenseParameter(name, shape, Reason.FRONTEND, detail))
    return WeightMap(tuple(sites), tuple(dense), vectors, told.by)


class _Told:
    """What a model tells of a checkpoint's tensors.

    Attributes:
        by: what tells of all of them, in words.
    """

    def __init__(self, checkpoint: Checkpoint, known: WeightMap | None) -> None:
        self._checkpoint = checkpoint
        self._sites = {} if known is None else known.by_any_name()
        self._dense = {} if known is None else {other.fqn: other for other in known.dense}
        self.by = "names and shapes" if known is None else f"a model: {known.frontend}"
        held = self._sites.keys() | self._dense.keys()
        if known is not None and held.isdisjoint(checkpoint.where):
            raise CheckpointError(
                f"model: none of its {len(held)} weights has a name in the checkpoint; they begin "
                f"with {next(iter(held), 'none')!r} and {next(iter(checkpoint.where), 'none')!r}"
            )

    def by_model(self, name: str) -> WeightSite | DenseParameter | None:
        """The weight that a tensor is in the model, or why it is none; None for other names."""
        found = self._sites.get(name) or self._dense.get(name)
        if found is None:
            return None
        held = self._checkpoint
        dtype, shape = held.files[held.where[name]].dtype_and_shape(name)
        if shape != found.shape:
            raise CheckpointError(
                f"{name}: expected shape {found.shape} as in the model, found {shape}"
            )
        if isinstance(found, DenseParameter):
            return found
        others = {*found.names, *(n for n, other in held.ties.items() if other == name)}
        aliases = tuple(sorted(others - held.where.keys()))
        return replace(found, fqn=name, aliases=aliases, dtype=str(dtype)[6:])


def assign(weights: WeightMap, mapping: MappingLike) -> Assignment:
    """What a mapping comes to on the weights of a checkpoint.

    Scales, positions, routers and the like, see `why_dense`, get a pattern only where an entry
    names them: `mlp.gate` does that for its `weight`; not `mlp.up` for its `weight_scale`.

    Raises:
        MappingError: the mapping does not fit.
    """
    mapping = SparsityMapping.of(mapping)
    aside = {
        site.fqn: reason
        for site in weights.sites
        if (reason := why_dense(site.fqn)) is not None and not _is_named(mapping, site)
    }
    meant = tuple(site for site in weights.sites if site.fqn not in aside)
    found = mapping.resolve(replace(weights, sites=meant))
    return replace(found, dense={**aside, **found.dense})


def _is_named(mapping: SparsityMapping, site: WeightSite) -> bool:
    """Whether an entry names a tensor; that of its owner speaks of a `weight` alone."""
    if not site.fqn.endswith(".weight"):
        site = replace(site, fqn=f"{site.fqn}.weight", aliases=())
    return mapping.names(site)


def _axes(name: str, shape: Sequence[int], roles: Roles) -> tuple[str, tuple[Role, ...] | None]:
    for regex, given in roles.items():
        if re.match(regex, name):
            if len(given) != len(shape):
                raise CheckpointError(
                    f"{name}: expected {len(shape)} roles, found {', '.join(given)} for {regex!r}"
                )
            return ("embedding" if "row" in given else "linear"), tuple(given)
    if len(shape) == 2:
        if _EMBEDDING.fullmatch(name):
            return "embedding", ("row", "dim")
        return "linear", ("out", "in")
    if len(shape) == 4:
        return "conv", ("out", "in", "kernel", "kernel")
    return "", None
