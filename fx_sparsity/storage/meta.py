"""Models without memory for their parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters of modules that are built inside lie on the meta device; buffers are real.

    Under `torch.device("meta")` what code computes and no checkpoint holds, such as the frequencies
    of rotary embeddings, would have no data either. A parameter is on the meta device as soon as
    its module has it, so that at most one is held at a time; ties stay ties.
    """
    moved = WeakIdKeyDictionary()

    def move(module: nn.Module, name: str, parameter: Tensor | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is
        if parameter not in moved:
            meta = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            vars(meta).update(vars(parameter))
            moved[parameter] = meta
        return moved[parameter]

    # Its annotation forgets that a hook may return a parameter.
    handle = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
