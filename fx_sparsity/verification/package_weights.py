"""The weights among the constants of a package that AOTInductor made."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from fx_sparsity.verification.aoti_constants import Constant, Package, Pt2Error
from fx_sparsity.verification.stored import LIVE_MASK, StoredWeight, float_weight

_MADE_UP = re.compile(
    r"_frozen_param\d+|_tensor_constant\d+|_FOLDED\w*|constant_\w+|lifted_tensor_\d+"
)
"""Names that Inductor, or a quantizer, gives to what it makes of others."""
_PART = re.compile(r"(.*?\.?)parametrizations\.(\w+)\.original(\d)?")
"""What export calls the tensors that a parametrization, or a tensor of several, is made of."""
_KEPT = "package it with inductor_configs={'always_keep_tensor_constants': True}"


def skeleton(package: Package) -> fx.GraphModule:
    """A graph that holds the constants and calls the operators that Inductor does not know.

    What they read that is no constant is a placeholder. It is for readers, and does not run.
    """
    root, graph = nn.Module(), fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for constant in package.constants:
        if constant.tensor is not None:
            _hold(root, constant.fqn, constant.tensor)
            nodes[constant.name] = graph.create_node("get_attr", constant.fqn)
    for call in package.calls:
        node = call["node"]
        if (operator := _operator(node["target"])) is None:
            continue
        arguments = {i["name"]: _argument(i["arg"], nodes, graph) for i in node["inputs"]}
        graph.call_function(operator, (), arguments)
    graph.output(())
    return fx.GraphModule(root, graph)


def _hold(root: nn.Module, fqn: str, tensor: Tensor) -> None:
    *path, name = fqn.split(".")
    owner = root
    for part in path:
        inner = owner._modules.get(part)
        if inner is None:
            inner = nn.Module()
            owner.add_module(part, inner)
        owner = inner
    owner.register_buffer(name, tensor)


def _operator(target: str) -> Any:
    """The operator of this process that a package calls; None where there is none."""
    namespace, _, name = target.partition("::")
    name, _, overload = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else getattr(packet, overload or "default", None)


def _argument(value: Mapping[str, Any], nodes: dict[str, fx.Node], graph: fx.Graph) -> Any:
    """What a call is given: a node, or a plain value."""
    (kind, content), *_ = value.items()
    if kind == "as_none":
        return None
    if kind != "as_tensor":
        return content
    name = content["name"]
    if name not in nodes:
        nodes[name] = graph.placeholder(name)
    return nodes[name]


def package_weights(package: Package) -> Iterator[StoredWeight]:
    """The weights of a package, under the names that they had in the exported program.

    Codes are known by their names: as pt2e calls them (`weight`, `weight_scale`,
    `weight_zero_point`), and as export calls the parts of torchao's tensors. What the compiled code
    makes of a constant is not looked into, as it is not of the parameters of a module.
    """
    held = {constant.fqn: constant for constant in package.constants}
    for fqn, constant in held.items():
        if constant.tensor is None or (_MADE_UP.fullmatch(fqn) and len(constant.shape) > 1):
            yield _nameless(constant)
        elif (match := _PART.fullmatch(fqn)) is not None:
            if match[3] in (None, "0"):
                yield _of_parts(f"{match[1]}{match[2]}", fqn, held)
        elif constant.tensor.is_floating_point() and constant.tensor.itemsize > 1:
            yield replace(float_weight(fqn, fqn, constant.tensor), write=_refuse)
        elif constant.tensor.itemsize == 1 and constant.tensor.dtype != torch.bool:
            yield _of_codes(fqn, constant.tensor, held)


def _nameless(constant: Constant) -> StoredWeight:
    layout = f", in the layout of {constant.layout}" if constant.layout else ""
    obstacle = (
        f"Inductor made it of other constants{layout}, and its name is lost: package without "
        "freezing, or verify the program that is packaged"
    )
    nothing = torch.empty(constant.shape, device="meta")
    return replace(_unknown(constant.fqn, nothing, obstacle), nameless=True)


def _of_codes(fqn: str, codes: Tensor, held: Mapping[str, Constant]) -> StoredWeight:
    """Codes as pt2e names them."""
    names = f"{fqn}_scale", f"{fqn}_zero_point"
    scale, zero_point = (held[n].tensor if n in held else None for n in names)
    if scale is None or zero_point is None:
        missing = names[scale is not None]
        return _unknown(
            fqn, codes, f"{missing}, which tells what its codes mean, is no constant: {_KEPT}"
        )
    axes = [axis for axis, size in enumerate(codes.shape) if scale.shape == (size,)]
    if not axes or (len(axes) > 1 and bool((zero_point != zero_point[:1]).any())):
        return _unknown(
            fqn, codes, f"{names[0]} of shape {tuple(scale.shape)} fits no one axis of it"
        )
    shape = [-1 if axis == axes[0] else 1 for axis in range(codes.ndim)]
    return _codes(
        fqn,
        fqn,
        codes,
        scale.view(shape),
        zero_point.view(shape),
        f"per-channel affine, axis {axes[0]}",
    )


def _of_parts(fqn: str, first: str, held: Mapping[str, Constant]) -> StoredWeight:
    """A weight that lies in several constants, as torchao's do: codes, scales, zero points."""
    path = first.removesuffix("0")
    codes = held[first].tensor
    assert codes is not None
    if not first.endswith("0"):
        live = f"{first.removesuffix('original')}0.mask" in held
        return _unknown(fqn, codes, LIVE_MASK if live else "it is computed")
    rest = [held[name].tensor for i in (1, 2, 3) if (name := f"{path}{i}") in held]
    scale, zero_point = (*rest, None, None)[:2]
    known = codes.dtype == torch.int8 or (codes.is_floating_point() and codes.itemsize == 1)
    fits = isinstance(scale, Tensor) and scale.is_floating_point() and _tiles(scale, codes)
    alike = zero_point is None or (isinstance(scale, Tensor) and zero_point.shape == scale.shape)
    if not (known and fits and alike and len(rest) < 3):
        return _unknown(fqn, codes, "it lies in several constants, of a kind that is not known")
    assert scale is not None
    zeros = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
    stored = _codes(fqn, first, codes, _spread(scale, codes), _spread(zeros, codes), "affine")
    return replace(stored, made_of=tuple(n for n in held if n.startswith(path)))


def _codes(
    fqn: str, where: str, codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: str
) -> StoredWeight:
    in_float = codes.is_floating_point()
    limits = None if in_float else torch.iinfo(codes.dtype)
    return StoredWeight(
        fqn,
        where,
        str(codes.dtype).removeprefix("torch."),
        scheme,
        codes.float() if in_float else codes,
        _refuse,
        scale,
        zero_point,
        None if limits is None else (limits.min, limits.max),
    )


def _unknown(fqn: str, tensor: Tensor, obstacle: str) -> StoredWeight:
    return replace(float_weight(fqn, fqn, tensor), obstacle=obstacle, write=_refuse)


def _tiles(scale: Tensor, codes: Tensor) -> bool:
    """Whether there is one scale for each of the blocks that codes are cut into."""
    return scale.ndim == codes.ndim and all(
        count and size % count == 0 for size, count in zip(codes.shape, scale.shape, strict=True)
    )


def _spread(values: Tensor, codes: Tensor) -> Tensor:
    for axis, size in enumerate(codes.shape):
        values = values.repeat_interleave(size // values.shape[axis], axis)
    return values


def _refuse(values: Tensor) -> NoReturn:
    raise Pt2Error("a package is read, not written")
