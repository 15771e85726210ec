"""What a tensor takes in a file, without the file's header."""

from torch import Tensor, nn

from fx_sparsity.pruning.costs import COSTS
from fx_sparsity.storage.formats import Contents, sizes


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that `save` writes of a tensor, in the format that is smallest for it.

    Of a tensor that is no plain one, such as torchao's, those that it takes in memory.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return tensor.nbytes
    return min(sizes(Contents(tensor.detach().cpu())).values())


COSTS.stored_bytes = stored_bytes
