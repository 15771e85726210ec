"""`python -m tests.benchmarks.bench_discovery`: what discovery adds to the time of torch.export.

Llama models of growing depth, built on the meta device, and one of 70B parameters.
"""

import resource
import sys
import time
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fx_sparsity import find_weights
from fx_sparsity.graph.frontends import export_model

SMALL = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
LARGE = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
}


def llama(**settings):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
        return model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)}


def seconds(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def discovery(layers, repeats=3):
    """Seconds of export, best seconds of discovery, and nodes of the graph."""
    model, inputs = llama(num_hidden_layers=layers, **SMALL)
    export, program = seconds(lambda: export_model(model, inputs))
    runs = [seconds(lambda: find_weights(program)) for _ in range(repeats)]
    assert len(runs[0][1]) == 7 * layers + 2
    return export, min(run[0] for run in runs), len(program.graph.nodes)


def large():
    """(Parameters, seconds, growth of resident memory in GB) of mapping 70B parameters."""
    model, inputs = llama(**LARGE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    elapsed, weights = seconds(lambda: find_weights(model, inputs))
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(weights) == 7 * 80 + 2
    assert weights.dense == ()
    return sum(p.numel() for p in model.parameters()), elapsed, growth / 2**20


def main():
    warnings.simplefilter("ignore")
    discovery(2)  # imports and caches
    parameters, elapsed, growth = large()
    print(f"{parameters / 1e9:.1f}B parameters on meta: {elapsed:.1f} s, {growth:.2f} GB more")
    print("layers  nodes  export s  discovery s  share  us a node")
    for layers in (4, 16, 48, 96):
        export, found, nodes = discovery(layers)
        print(
            f"{layers:6}  {nodes:5}  {export:8.2f}  {found:11.4f}  {found / export:5.1%}  "
            f"{found / nodes * 1e6:9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
