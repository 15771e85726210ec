"""`save_pretrained` of torchao's tensors: transformers writes those that it has made itself."""

from torch import nn

from fx_sparsity.quantization.backend import BackendError
from fx_sparsity.quantization.torchao_tensors import is_torchao


def refuse_codes(module: nn.Module) -> BackendError | None:
    """See `REFUSALS`."""
    names = [name for name, tensor in module.named_parameters() if is_torchao(tensor)]
    by_transformers = getattr(module, "hf_quantizer", None) is not None
    if by_transformers or not names:
        return None
    return BackendError(
        f"{type(module).__name__} has codes of torchao, such as {names[0]}, and save_pretrained "
        "writes those of models alone that from_pretrained has quantized; fx_sparsity.save writes "
        "them, and fx_sparsity.load reads them into a model that is quantized alike"
    )
