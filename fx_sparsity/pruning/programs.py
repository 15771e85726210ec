"""Exported programs: pruned as a module of their own, which becomes a program again."""

import copy
from weakref import WeakKeyDictionary

from torch import nn
from torch.export import ExportedProgram

from fx_sparsity.graph.discovery import find_weights
from fx_sparsity.graph.passes import mask_path
from fx_sparsity.graph.program_editor import insert_masks
from fx_sparsity.graph.sources import named_tensors
from fx_sparsity.sparsifier import BaseSparsifier, Mask
from fx_sparsity.sparsifier.mask import GRAPH_MASKS

_BEGUN: WeakKeyDictionary[nn.Module, ExportedProgram] = WeakKeyDictionary()
"""Modules of programs whose pruning was interrupted."""


def begin(program: ExportedProgram, sparsifier: BaseSparsifier) -> nn.Module:
    """A module that computes what a program does, with tensors of its own.

    Args:
        program: not changed.
        sparsifier: where an interrupted call has bound it to such a module, that one is returned.
    """
    held = getattr(sparsifier, "model", None)
    if held is not None and _BEGUN.get(held) is program:
        return held
    module = copy.deepcopy(program.module())
    for site in find_weights(program).sites:
        for alias in site.aliases:  # loading has made several tensors of a tied one
            path, _, attribute = alias.rpartition(".")
            setattr(module.get_submodule(path), attribute, module.get_parameter(site.fqn))
    _BEGUN[module] = program
    return module


def finish(program: ExportedProgram, module: nn.Module) -> ExportedProgram:
    """The program that selects through the masks of a module, and shares all tensors with it.

    Args:
        program: not changed.
        module: that `begin` made of it, masked since.
    """
    place = f"{GRAPH_MASKS}."
    masks = {
        fqn: mask
        for path, mask in module.named_modules(remove_duplicate=False)
        if isinstance(mask, Mask)
        and f"{mask_path(fqn := path.removeprefix(place))}.mask" not in program.state_dict
    }
    pruned = insert_masks(program, masks)
    own = dict(named_tensors(module))
    for held in (pruned.state_dict, pruned.constants):
        held.update({name: own[name] for name in held if name in own})
    del _BEGUN[module]
    return pruned
