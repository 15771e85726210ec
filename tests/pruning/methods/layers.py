"""Weights whose inputs are correlated, and the statistics that calibration would collect."""

import torch

from fx_sparsity.patterns import Pattern
from fx_sparsity.pruning.methods import Statistics

ROLES = ("batch", "out", "in")


def correlated_inputs(tokens, width, generator, mixing=0.7):
    """Standard normal inputs, mixed with one another, of unequal size: [tokens, width]."""
    mix = torch.randn(width, width, generator=generator) / width**0.5 * mixing + torch.eye(width)
    scale = torch.exp(0.5 * torch.randn(width, generator=generator))
    return torch.randn(tokens, width, generator=generator) @ mix * scale


def layer(out, width, groups=1, tokens=None, seed=0):
    """A weight [groups, out, width] and all of its statistics."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, out, width, generator=generator) * 0.05
    tokens = 8 * width if tokens is None else tokens
    x = torch.stack([correlated_inputs(tokens, width, generator) for _ in range(groups)])
    gradients = torch.randn(weight.shape, generator=generator)
    return weight, Statistics(
        torch.full((groups,), tokens),
        squares=x.square().sum(1),
        sums=x.sum(1),
        gram=x.mT @ x,
        gradients=gradients,
        gradient_squares=gradients.square() + 0.1,
    )


def tiling_of(pattern, weight):
    return Pattern.parse(pattern).tiling(weight.shape, ROLES)


def loss(weight, solved, gram):
    """||(W - V) X||^2 in float64."""
    difference = (weight - solved).double()
    return float(((difference @ gram.double()) * difference).sum())
