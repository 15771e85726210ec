"""`save_pretrained` of a lowered model: it would write packed weights, which nothing could load."""

from torch import nn

from fx_sparsity.kernels.packed_module import PackedModule
from fx_sparsity.kernels.semi_structured import is_semi_structured
from fx_sparsity.lowering.policy import LoweringError


def refuse_packed(module: nn.Module) -> LoweringError | None:
    """See `REFUSALS`."""
    if not any(
        isinstance(part, PackedModule) or is_semi_structured(getattr(part, "weight", None))
        for part in module.modules()
    ):
        return None
    return LoweringError(
        f"{type(module).__name__} is lowered: from_pretrained would find packed weights, and start "
        "from others in silence. Save before lower, or call unlower(model) first"
    )
