"""The weights of a checkpoint, by names and shapes alone, and what a mapping comes to on them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.checkpoints.names import why_dense
from fx_sparsity.graph import MappingLike, SparsityMapping, WeightMap, WeightSite
from fx_sparsity.graph.mapping import Assignment
from fx_sparsity.graph.weight_map import DenseParameter, Reason
from fx_sparsity.patterns import Role

_EMBEDDING = re.compile(r"(?:.*[._])?(?:\w*embed\w*|wte|wpe)(?:[._].*)?", re.IGNORECASE)

Roles = Mapping[str, Sequence[Role]]
"""Regular expression over names -> roles of the axes; the first that matches from the start."""


def find_checkpoint_weights(checkpoint: Checkpoint, roles: Roles | None = None) -> WeightMap:
    """The weights of a checkpoint, by names and shapes alone.

    A floating matrix is an `embedding` (row, dim) where its name says so (`embed`, `wte`, `wpe`),
    else `linear` (out, in); four axes are those of a `conv`. What three axes mean, and whether a
    matrix is stored the other way round, only `roles` can say.

    Args:
        checkpoint: its tensors.
        roles: regular expression -> roles; wins over names and shapes.
    """
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
    return WeightMap(tuple(sites), tuple(dense), vectors, "names and shapes")


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
