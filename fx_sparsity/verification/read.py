"""How a model stores its weights now: as floats, or in ways whose readers are registered here."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from fx_sparsity.graph.calls import operator_name
from fx_sparsity.graph.uses import is_annotated
from fx_sparsity.sparsifier import Mask
from fx_sparsity.sparsifier.mask import masked_weights
from fx_sparsity.sparsifier.wrappers import plain_paths, run_by
from fx_sparsity.verification.aoti_constants import Package, Pt2Error
from fx_sparsity.verification.graph_reader import read_nodes
from fx_sparsity.verification.onnx_file import read_onnx
from fx_sparsity.verification.openvino_file import read_openvino
from fx_sparsity.verification.package_weights import package_weights, skeleton
from fx_sparsity.verification.pt2_file import is_archive, read_pt2
from fx_sparsity.verification.stored import (
    LIVE_MASK,
    Forms,
    OwnFormat,
    StoredWeight,
    float_weight,
    is_float,
)

READERS: list[Callable[[nn.Module], Iterable[StoredWeight]]] = []
"""What finds weights that are not plain floats; whoever stores them so adds its function."""
WRAPPERS: list[Callable[[nn.Module, str], bool]] = []
"""Whether a module is only put around its child of that name, whose weights were its own before;
whoever wraps modules so adds its function."""
_SCALING = ("quantize_", "dequantize_")
"""What reads scales and zero points, which are no weights."""


def read_weights(model: nn.Module | ExportedProgram | str | Path) -> list[StoredWeight]:
    """How a model stores its weights now: quantized, packed by `lower`, or as floats.

    Args:
        model: a module, compiled or not; a GraphModule, whose weights have their names where
            `AnnotateWeights` ran before it was quantized; an ExportedProgram; or the path of a
            `.pt2` file, see `read_pt2`, of an ONNX file, or of the `.xml` of an OpenVINO IR.

    Raises:
        Pt2Error, OnnxError, OpenVinoError: the file cannot be read.
    """
    if isinstance(model, str | Path):
        if Path(model).suffix == ".xml":
            return list(read_openvino(model))
        if not is_archive(model):
            return list(read_onnx(model))
        held = read_pt2(model)
        if isinstance(held, Package):
            return _read_package(held)
        model = held.module(check_guards=False)  # that come from the file, and would be run
    if isinstance(model, ExportedProgram):
        model = model.module()
    while (inner := run_by(model)) is not None:
        model = inner
    stored = [_computed_with(model, weight) for read in READERS for weight in read(model)]
    stored += _exported_masks(model) if isinstance(model, fx.GraphModule) else []
    stored += read_nodes(model) if isinstance(model, fx.GraphModule) else []
    known = {name for weight in stored for name in (weight.where, *weight.made_of)}
    rest = [weight for weight in _read_float(model) if weight.where not in known]
    if isinstance(model, fx.GraphModule):
        reached = _reached(model)
        stored, rest = (
            [weight for weight in part if any(map(reached, (weight.where, *weight.made_of)))]
            for part in (stored, rest)
        )
    plain = plain_paths(model)
    stored, rest = (
        [_also_plainly(weight, plain) for weight in _of_the_place(model, part)]
        for part in (stored, rest)
    )
    if not (isinstance(model, fx.GraphModule) and is_annotated(model.graph)):
        return stored + rest
    # Convert leaves tensors behind that nothing reads, and others that are not read as weights.
    reads = {
        str(node.target)
        for node in model.graph.find_nodes(op="get_attr")
        if any(not operator_name(user).startswith(_SCALING) for user in node.users)
    }
    calls = tuple(f"{node.target}." for node in model.graph.find_nodes(op="call_module"))
    stored += [replace(weight, incidental=True) for weight in rest if weight.where in reads]
    return stored + [weight for weight in rest if weight.where.startswith(calls)]


def _read_package(package: Package) -> list[StoredWeight]:
    """The weights of a package: what readers know of its calls, and the other constants.

    Raises:
        Pt2Error: what a call reads is no packed weight.
    """
    graph = skeleton(package)
    try:
        called = [weight for read in READERS for weight in read(graph)]
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        raise Pt2Error(f"packed weights are corrupt: {error}") from error
    known = {name for weight in called for name in (weight.where, *weight.made_of)}
    return called + [weight for weight in package_weights(package) if weight.where not in known]


def _exported_masks(model: fx.GraphModule) -> Iterator[StoredWeight]:
    """Weights of a graph that was exported with live masks, which are not baked in."""
    parameters = dict(model.named_parameters())
    for fqn in masked_weights(model):
        path, _, attribute = fqn.rpartition(".")
        place = f"{path}.parametrizations.{attribute}".removeprefix(".")
        original = parameters.get(f"{place}.original")
        if original is not None and not isinstance(model.get_submodule(f"{place}.0"), Mask):
            yield replace(float_weight(fqn, f"{place}.original", original), obstacle=LIVE_MASK)


def _computed_with(model: nn.Module, weight: StoredWeight) -> StoredWeight:
    """A quantized weight; with an obstacle where a module has been given another forward.

    The hooks of accelerate, which move tensors, are none.
    """
    owner = model
    for name in weight.where.split(".")[:-1]:
        inner = owner._modules.get(name)
        owner = owner if inner is None else inner
    if weight.obstacle or "forward" not in vars(owner) or hasattr(owner, "_hf_hook"):
        return weight
    return replace(weight, obstacle=own_forward(owner))


def own_forward(module: nn.Module) -> str:
    """What to say of a module that does something else than its class does."""
    return f"its {type(module).__name__} has a forward of its own, which may read something else"


def _reached(model: fx.GraphModule) -> Callable[[str], bool]:
    """Whether a graph reads what goes by a name: itself, or in a module that it calls."""
    named = {
        str(node.target) for node in model.graph.nodes if node.op in ("call_module", "get_attr")
    }

    def reached(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in named for end in range(1, len(parts) + 1))

    return reached


def _also_plainly(weight: StoredWeight, plain: Mapping[str, str]) -> StoredWeight:
    """A weight that goes by the name, too, that it had before something was put around its module.

    Args:
        weight: of the model.
        plain: see `plain_paths`.
    """
    path, _, attribute = weight.fqn.rpartition(".")
    if path not in plain:
        return weight
    name = f"{plain[path]}.{attribute}".removeprefix(".")
    return replace(weight, aliases=(*weight.aliases, name))


def _of_the_place(model: nn.Module, stored: list[StoredWeight]) -> list[StoredWeight]:
    """Weights of modules that are forms of another, by the names that they had in its place."""
    places = {
        f"{path}.{form}.".removeprefix("."): f"{path}.".removeprefix(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Forms)
        for form in module.forms
    }
    named = []
    for weight in stored:
        form = next(filter(weight.fqn.startswith, places), "")
        fqn = places.get(form, "") + weight.fqn.removeprefix(form)
        named.append(replace(weight, fqn=fqn) if form else weight)
    return named


def _read_float(model: nn.Module) -> Iterator[StoredWeight]:
    """Floating parameters and buffers under each name; masked ones as the model sees them."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Mask | parametrize.ParametrizationList | OwnFormat):
            continue
        for attribute in (*module._parameters, *module._buffers, *_parametrized(module)):
            tensor = getattr(module, attribute)
            if is_float(tensor):
                fqn = f"{prefix}.{attribute}".removeprefix(".")
                yield replace(
                    float_weight(fqn, fqn, tensor),
                    aliases=tuple(_other_names(model, prefix, module, attribute, tensor)),
                    computed=", ".join(
                        type(step).__name__ for step in _parametrized(module).get(attribute, ())
                    ),
                )


def _parametrized(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Attribute -> what parametrizes it."""
    entries: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    return dict(entries.items())


def _other_names(
    model: nn.Module, prefix: str, module: nn.Module, attribute: str, tensor: Tensor
) -> Iterator[str]:
    """What a float tensor may have been called before a quantizer moved it, or beneath a norm."""
    path, _, last = prefix.rpartition(".")
    above = model.get_submodule(path) if prefix else None
    if above is not None and any(wraps(above, last) for wraps in WRAPPERS):
        yield f"{path}.{attribute}".removeprefix(".")
    if (entry := _parametrized(module).get(attribute)) is not None:
        for name, original in entry.named_parameters(recurse=False):
            if original.shape == tensor.shape and name != "original":
                yield f"{prefix}.parametrizations.{attribute}.{name}".removeprefix(".")


def by_name(
    stored: Iterable[StoredWeight], names: Mapping[str, Sequence[str]]
) -> dict[str, list[StoredWeight]]:
    """Every stored copy of each weight that is asked for; one float tensor counts once.

    Args:
        stored: what a model holds.
        names: canonical FQN in the float model -> its further names there.
    """
    canonical = {name: fqn for fqn, aliases in names.items() for name in (fqn, *aliases)}
    stored = list(stored)
    exact = {weight.fqn for weight in stored}
    found: dict[str, list[StoredWeight]] = {fqn: [] for fqn in names}
    seen: set[tuple[str, int]] = set()
    for weight in stored:
        called = (weight.fqn, *(alias for alias in weight.aliases if alias not in exact))
        fqn = next((canonical[name] for name in called if name in canonical), None)
        if fqn is None:
            continue
        if not weight.quantized and weight.data.device.type != "meta":
            place = (fqn, weight.data.data_ptr())
            if place in seen:
                continue
            seen.add(place)
        found[fqn].append(weight)
    return found
