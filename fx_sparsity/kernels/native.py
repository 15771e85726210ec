"""Which C++ operators there are for a call, and packing by them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fx_sparsity._native import KERNELS, SCHEMAS
from fx_sparsity.kernels import panels


def libraries() -> tuple[Path, Path]:
    """The files that give a process without this package the operators of lowered models.

    Load both before an AOTInductor package: with `torch.ops.load_library` where there is Python, or
    `dlopen` where there is none. They are compiled for this machine's processor and torch, unless a
    wheel brought them. A process has its operators from them or from `import fx_sparsity`, not from
    both: torch lets nobody define an operator twice. They are for the CPU alone.

    Returns:
        The schemas of the operators, and their kernels. Built first, if need be.

    Raises:
        BuildError: they cannot be built.
    """
    return SCHEMAS.build(), KERNELS.build()


def cpu_kernel(name: str, x: Tensor) -> Callable[..., Tensor] | None:
    """The operator `name`, with namespace and overload, once the library gave it a kernel for `x`.

    The overload called "default" goes without saying.
    """
    # Private, since torch.library tells of no kernels; without it plain torch would call itself.
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if x.device.type == "cpu" and KERNELS.ready() and has_kernel(name, "CPU"):
        namespace, _, operator = name.partition("::")
        operator, _, overload = operator.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator)
        return getattr(packet, overload or "default")
    return None


def packs_natively(weight: Tensor) -> bool:
    """Whether `pack_natively` takes a weight: it lies on the CPU, and the library is ready."""
    return weight.device.type == "cpu" and KERNELS.ready()


def pack_natively(
    weight: Tensor, offsets: Tensor, pattern: tuple[int, int] = (0, 0)
) -> dict[str, Tensor]:
    """The mask and the values of a weight in panels, by the C++ library.

    Args:
        weight: [out, in], contiguous; see `packs_natively`.
        offsets: int64 [panels + 1], where each panel's values begin, and where the last ends.
        pattern: N and M, if of every M neighbours N are kept, zeros among them.

    Returns:
        The parts `mask` and `values` of "bitmask" and "nm".
    """
    shape, dtype, total = weight.shape, weight.dtype, int(offsets[-1])
    count, groups = panels.panel_count(shape), panels.group_count(shape, dtype)
    mask = torch.empty(count, groups, 2 * panels.GROUP[dtype], dtype=torch.uint8)
    values = weight.new_empty(total + panels.padding(dtype))
    values[total:] = 0
    torch.ops.fx_sparsity.pack_panels(weight, *pattern, offsets, mask, values[:total])
    return {"mask": mask, "values": values}
