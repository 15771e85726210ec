"""From a dense language model to measured tokens a second, sparse and quantized.

python examples/fast_sparse_inference.py --dim 512 --layers 8
"""

import argparse
import copy
import time

import torch
from prune_language_model import LanguageModel
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import fx_sparsity as fxs


@torch.inference_mode()
def tokens_per_second(model: nn.Module, token: torch.Tensor, calls: int = 20) -> float:
    """Steps of one token, after as many to warm up."""
    compiled = torch.compile(model)
    for call in range(2 * calls):
        if call == calls:
            start = time.perf_counter()
        compiled(token)
    return calls / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    size = parser.parse_args()
    torch.manual_seed(0)
    model = LanguageModel(size.dim, size.layers, heads=6 if size.dim % 6 == 0 else 8).eval()
    token = torch.randint(256, (1, 1))

    # Half of every linear layer goes, then both models are quantized to 8 bits.
    sparse, sparsifier = copy.deepcopy(model), fxs.WeightNormSparsifier()
    mapping = fxs.SparsityMapping().set_object_type("linear", "unstructured 50%")
    fxs.prepare(sparse, sparsifier, (token,), mapping)
    sparsifier.step()
    sparse, record = fxs.squash(sparse, sparsifier)
    for each in (model, sparse):
        quantize_(each, Int8DynamicActivationInt8WeightConfig())
    fxs.verify(sparse, record).raise_if_lost()
    dense_speed = tokens_per_second(model, token)

    # What is faster sparse on this machine gets a kernel; the rest stays, and the report says why.
    sparse, report = fxs.lower(sparse, (token,), policy="auto", record=record)
    print(report, "\n")
    print(f"dense int8 {dense_speed:.0f} tokens/s, sparse {tokens_per_second(sparse, token):.0f}")


if __name__ == "__main__":
    main()
