"""Names for those who come from torch.ao.pruning and from torchao, and what transformers asks for.

Compressed folders load with `from_pretrained` from the moment on when both packages are imported.
"""

import logging

from fx_sparsity.compat.after_import import after_import

_log = logging.getLogger(__name__)


def _register_with_transformers() -> None:
    try:
        from fx_sparsity.compat.transformers import register
    except ImportError as error:
        _log.warning("compressed checkpoints do not load with this transformers: %s", error)
    else:
        register()


after_import("transformers.quantizers.auto", _register_with_transformers)
