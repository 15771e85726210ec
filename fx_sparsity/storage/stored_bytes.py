"""What a tensor takes in a file, without the file's header."""

from torch import Tensor

from fx_sparsity.pruning.costs import COSTS
from fx_sparsity.quantization.torchao_tensors import is_torchao
from fx_sparsity.storage.described_state import flatten, is_plain
from fx_sparsity.storage.formats import Contents, sizes


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that `save` writes of a tensor, in the format that is smallest for it.

    Of one that is quantized, its codes and scales; of others that are no plain ones, those that
    they take in memory.
    """
    if is_plain(tensor):
        return min(sizes(Contents(tensor.detach().cpu())).values())
    if tensor.is_quantized or is_torchao(tensor):
        parts, _ = flatten({"": tensor})
        return sum(map(stored_bytes, parts.values()))
    return tensor.nbytes


COSTS.stored_bytes = stored_bytes
