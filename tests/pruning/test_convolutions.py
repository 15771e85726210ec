"""Convolutions whose channels N:M does not divide: remainder policies, for every method."""

import copy

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity import prune
from fx_sparsity.masks import compute_mask
from fx_sparsity.patterns import Pattern, PatternError
from fx_sparsity.pruning import methods

ROLES = ("out", "in", "kernel", "kernel", "kernel")
LAYERS = {
    "stem": (lambda: nn.Conv2d(3, 8, 3), (5, 3, 8, 8)),
    "edge": (lambda: nn.Conv2d(6, 8, 3), (5, 6, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (5, 6, 8, 8)),
    "grouped": (lambda: nn.Conv2d(12, 8, 3, groups=2), (5, 12, 8, 8)),
    "one axis": (lambda: nn.Conv1d(7, 8, 5), (5, 7, 16)),
    "three axes": (lambda: nn.Conv3d(3, 4, 2), (5, 3, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 2), (5, 6, 4, 4)),
}
PATTERNS = ["2:4 pad", "2:4 dense", "1:4 dense", "5:8 pad"]
METHODS = {
    "random": methods.RandomSparsifier,
    "sparsegpt": methods.SparseGPTSparsifier,
    "reordered": methods.ReorderedSparseGPTSparsifier,
    "admm": methods.ADMMSparsifier,
    "alps": methods.QuickALPSSparsifier,
    "pipeline": lambda: methods.Pipeline(
        methods.SparseGPTSparsifier(), methods.Swaps(), methods.ExactUpdate()
    ),
}


def layer_and_batches(kind):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    return build().eval(), [(torch.randn(shape),) for _ in range(2)]


def expected(layer, scores, pattern):
    """The mask of scores as they are stored, straight from the engine."""
    roles = list(ROLES[: scores.ndim])
    if isinstance(layer, nn.ConvTranspose2d):
        roles[:2] = "in", "out"
    parsed = Pattern.parse(pattern)
    return compute_mask(scores, parsed.tiling(scores.shape, roles), parsed.implied_level)


def input_norms(layer, batches):
    """Of every weight, in float64: the products with one-hot weights, squared and summed."""
    squares = torch.zeros_like(layer.weight, dtype=torch.float64)
    single = copy.deepcopy(layer).double().requires_grad_(False)
    single.bias.zero_()
    for place in (layer.weight == layer.weight).nonzero().tolist():
        single.weight.zero_()
        single.weight[tuple(place)] = 1
        squares[tuple(place)] = sum(single(x.double()).square().sum() for (x,) in batches)
    return squares.sqrt()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", LAYERS)
def test_masks_by_scores_are_those_of_storage(kind, pattern):
    layer, batches = layer_and_batches(kind)
    with torch.no_grad():
        layer.weight[0] = 0  # as good as filling
    magnitudes = layer.weight.detach().abs()
    norms = input_norms(layer, batches)
    for method, scores in (
        (fxs.WandaSparsifier(), magnitudes * norms),
        (methods.MagnitudeSparsifier(), magnitudes),
        (methods.CriterionSparsifier(lambda w, stats: w - 3), layer.weight.detach() - 3),
    ):
        pruned, report = prune(copy.deepcopy(layer), method, batches, pattern)
        mask = method.get_mask("weight")
        assert torch.equal(mask, expected(layer, scores, pattern)), method
        assert torch.equal(pruned.weight, layer.weight * mask)
        assert report["weight"].notes == ()
    prepared, plain = copy.deepcopy(layer), fxs.WeightNormSparsifier(norm="L1")
    fxs.prepare(prepared, plain, batches[0], pattern)
    plain.step()
    assert torch.equal(plain.get_mask("weight"), expected(layer, magnitudes, pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_to_the_policy(name, kind, pattern):
    layer, batches = layer_and_batches(kind)
    dense, method, wanda = copy.deepcopy(layer), METHODS[name](), fxs.WandaSparsifier()
    by_norms, _ = prune(copy.deepcopy(layer), wanda, batches, pattern)
    pruned, report = prune(layer, method, batches, pattern)
    mask, usual = method.get_mask("weight"), wanda.get_mask("weight")
    axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    groups = mask.split(Pattern.parse(pattern).m, axis), usual.split(Pattern.parse(pattern).m, axis)
    for found, wanted in zip(*groups, strict=True):
        assert torch.equal(found.sum(axis), wanted.sum(axis))
    _, unfilled = prune(copy.deepcopy(dense), fxs.WandaSparsifier(), batches, "unstructured 50%")
    assert report["weight"].tokens == unfilled["weight"].tokens
    assert not any("always zero" in note for note in report["weight"].notes)
    if name != "random":
        error, usual_error = (
            sum((m(x) - dense(x)).square().sum() for (x,) in batches) for m in (pruned, by_norms)
        )
        assert error <= usual_error * 1.001 + 1e-6


def test_blocks_that_leave_edges_within_are_refused_by_name():
    layer, batches = layer_and_batches("edge")
    with pytest.raises(PatternError, match=r"^weight: blocks of .* leave edges within it"):
        prune(layer, fxs.WandaSparsifier(), batches, "block:1x4 pad 50%")


def test_statistics_with_filling_are_not_shared_with_others():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.a(x) + self.b(x)

    torch.manual_seed(0)
    model, batches = Two().eval(), [(torch.randn(4, 3, 6, 6),)]
    mapping = fxs.SparsityMapping().set_global("2:4 pad").set_module_name("b", "rows 50%")
    alone, method = copy.deepcopy(model.b), fxs.WandaSparsifier()
    prune(model, method, batches, mapping)
    other = fxs.WandaSparsifier()
    prune(alone, other, batches, "rows 50%")
    assert torch.equal(method.get_mask("b.weight"), other.get_mask("weight"))
