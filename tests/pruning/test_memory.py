"""What pruning eight layers takes beyond the model, byte by byte."""

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.pruning.methods import ExactUpdate, ReorderedSparseGPTSparsifier, Swaps
from tests.pruning.peak_memory import live_activations, mask_bytes, peak_bytes

WIDTH, HIDDEN, LAYERS, TOKENS = 256, 1024, 8, 1024
COMPOSED = fxs.Pipeline(ReorderedSparseGPTSparsifier(), Swaps(), ExactUpdate(0.01, 1e-3))


class Layer(nn.Module):
    """A gated MLP: two products that share their inputs, and one that is wide."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return x + self.down(self.gate(x).relu() * self.up(x))


def layers():
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(LAYERS))).eval()
    return model, [(torch.randn(TOKENS // 4, WIDTH),) for _ in range(4)]


def prune(method, sequential=True):
    """Bytes at the peak beyond the model, and what they may be."""
    model, batches = layers()
    statistics = {"input_norm": HIDDEN, "gram": HIDDEN**2}
    largest = 4 * sum(statistics[name] for name in method.needs) + 8
    allowed = mask_bytes(model) + 2 * largest + live_activations(model, batches)
    mapping = fxs.SparsityMapping().set_global("2:4")
    peak, (_, report) = peak_bytes(
        lambda: fxs.prune(model, method, batches, mapping, sequential=sequential, progress=False)
    )
    assert len(report) == 3 * LAYERS
    return peak, allowed


@pytest.mark.parametrize(
    "method",
    [fxs.WandaSparsifier, fxs.SparseGPTSparsifier, lambda: COMPOSED],
    ids=["wanda", "sparsegpt", "composed"],
)
def test_two_statistics_and_the_live_activations_are_enough(method):
    peak, allowed = prune(method())
    assert peak <= allowed


def test_statistics_of_all_layers_at_once_are_more_than_that():
    peak, allowed = prune(fxs.SparseGPTSparsifier(), sequential=False)
    assert peak > allowed
