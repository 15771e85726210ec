"""Masks against the installed `torch.ao.pruning`, over a grid of shapes, blocks, levels and norms.

Identical wherever the reference is right. Where it is not, `EXCEPTIONS` says why, and the test holds
our mask to the definition instead.
"""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier as ReferenceWeightNorm
from torch.ao.pruning._experimental.data_sparsifier import DataNormSparsifier as ReferenceDataNorm

import fx_sparsity as fxs
from fx_sparsity.patterns import PatternError

SHAPES = [(8, 16), (16, 12), (1, 8), (5, 1), (6, 10), (7, 9), (16,)]
BLOCKS = [(1, 1), (1, 4), (2, 2), (4, 1), (4, 4)]
LEVELS = [-0.5, 0.0, 0.25, 0.5, 0.77, 1.0, 1.5]
ZEROS = [None, 0, 1, 2, 3, 4]
NORMS = ["L1", "L2"]

EXCEPTIONS = {
    "shape": "the reference's mask has another shape than the weight: it is one-dimensional, has a "
    "single column, or its blocks are ragged",
    "raises": "the reference raises on ragged blocks with zeros_per_block",
    "negative": "the reference's data sparsifier takes a negative level as an index from the end; "
    "here levels below 0 mean dense, as its weight sparsifier has it",
    "last block": "the reference never prunes the last block below level 1, however it rounds",
}


def distinct(shape):
    """Values whose magnitudes, and whose blocks' means, are all distinct."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(count)
    order = torch.randperm(count, generator=generator).double() + 1
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return (order**1.3 / count * sign).float().view(shape)


def reference_mask(kind, weight, level, block, zeros, norm):
    """The reference's mask as booleans, or the name of the exception it raises."""
    try:
        if kind == "data":
            sparsifier = ReferenceDataNorm([("w", weight.clone())], level, block, zeros, norm=norm)
            sparsifier.step()
            return sparsifier.get_mask("w").bool()
        model = holder(weight)
        sparsifier = ReferenceWeightNorm(level, block, zeros, norm=int(norm[1]))
        sparsifier.prepare(model, [{"tensor_fqn": "weight"}])
        sparsifier.step()
        return model.parametrizations.weight[0].mask.bool()
    except (RuntimeError, ValueError) as error:
        return type(error).__name__


def our_mask(kind, weight, level, block, zeros, norm):
    if kind == "data":
        sparsifier = fxs.DataNormSparsifier([("w", weight.clone())], level, block, zeros, norm)
        sparsifier.step()
        return sparsifier.get_mask("w").bool()
    sparsifier = fxs.WeightNormSparsifier(level, block, zeros, norm)
    sparsifier.prepare(holder(weight), [{"tensor_fqn": "weight"}])
    sparsifier.step()
    return sparsifier.get_mask("weight").bool()


def holder(weight):
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(weight.clone()))
    return model


def mask_by_definition(weight, level, block, zeros, norm):
    """Block by block in Python, in float64."""
    matrix = weight.double().reshape(-1, weight.shape[-1])
    scores = matrix.abs() if norm == "L1" else matrix**2
    keep = torch.ones_like(matrix, dtype=torch.bool)
    starts = itertools.product(
        range(0, matrix.shape[0], block[0]), range(0, matrix.shape[1], block[1])
    )
    blocks = [(slice(i, i + block[0]), slice(j, j + block[1])) for i, j in starts]
    blocks.sort(key=lambda at: scores[at].mean().item())
    for at in blocks[: round(min(max(level, 0), 1) * len(blocks))]:
        part = keep[at].clone().flatten()
        gone = len(part) if zeros is None else min(zeros, len(part))
        part[scores[at].flatten().sort(stable=True).indices[:gone]] = False
        keep[at] = part.view(keep[at].shape)
    return keep.view(weight.shape)


def why_different(kind, reference, ours, weight, level, block):
    """Which entry of `EXCEPTIONS` explains a difference; None where there is none."""
    if isinstance(reference, str):
        return "raises"
    if reference.shape != ours.shape:
        return "shape"
    if torch.equal(reference, ours):
        return None
    if level < 0:
        return "negative" if kind == "data" else "unexplained"
    rows, columns = (1, *weight.shape)[-2:]
    count = -(-rows // block[0]) * -(-columns // block[1])
    if level < 1 and round(level * count) == count:
        return "last block"
    return "unexplained"


@pytest.mark.parametrize("kind", ["weight", "data"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_masks_agree_with_the_reference_wherever_it_is_right(kind, shape, block):
    weight = distinct(shape)
    cases = list(itertools.product(LEVELS, ZEROS, NORMS))
    reasons = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for level, zeros, norm in cases:
            if zeros is not None and zeros > block[0] * block[1]:
                continue
            ours = our_mask(kind, weight, level, block, zeros, norm)
            assert torch.equal(ours, mask_by_definition(weight, level, block, zeros, norm))
            reference = reference_mask(kind, weight, level, block, zeros, norm)
            reasons.append(why_different(kind, reference, ours, weight, level, block))
    assert "unexplained" not in reasons
    divides = len(shape) == 2 and shape[0] % block[0] == 0 and shape[1] % block[1] == 0
    if divides and shape[0] > 1 and shape[1] > 1:
        assert set(reasons) <= {None, "negative"}


def test_zeros_beyond_the_block_are_refused_by_both():
    assert reference_mask("weight", torch.randn(4, 4), 0.5, (1, 4), 5, "L1") == "ValueError"
    with pytest.raises(PatternError, match=r"zeros_per_block must lie in 0..4.*found 5"):
        fxs.WeightNormSparsifier(0.5, (1, 4), 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_ranked_without_underflow_unlike_the_reference(dtype):
    weight = torch.tensor([[2e-5, 1e-5, 4e-5, 3e-5]], dtype=dtype)
    mask = our_mask("data", weight, 0.5, (1, 1), None, "L2")
    assert mask.tolist() == [[False, False, True, True]]
    model = nn.Linear(8, 8, bias=False).to(dtype)
    sparsifier = fxs.WeightNormSparsifier()
    sparsifier.prepare(model)
    sparsifier.step()
    model(torch.randn(2, 8, dtype=dtype))
    sparsifier.squash_mask()
    assert model.weight.dtype == dtype
