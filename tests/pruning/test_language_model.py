"""The methods on a language model that has learned a little: the order that papers report."""

import copy
import itertools
import statistics

import pytest
import torch

import fx_sparsity as fxs
from examples.prune_language_model import (
    BEST,
    METHODS,
    LanguageModel,
    Measured,
    judge,
    load_text,
    sample,
    train,
)

pytestmark = pytest.mark.exhaustive
MAPPING = fxs.SparsityMapping().set_module_name_regex("blocks", "2:4")


@pytest.fixture(scope="module")
def learned():
    """(a small model after 400 steps of training, calibration batches, unseen text)."""
    text, held_out = load_text()
    torch.manual_seed(0)
    model = LanguageModel()
    for _ in train(model, text, steps=400):
        pass
    model.eval().requires_grad_(False)
    tokens = sample(text, 128, torch.Generator().manual_seed(2))[:, :-1]
    return model, list(tokens.split(64)), held_out


def test_layer_errors_at_two_of_four(learned):
    model, batches, _ = learned
    errors = {}
    for name in ("magnitude", "Wanda", "SparseGPT", BEST):
        method = Measured(METHODS[name]())
        _, report = fxs.prune(copy.deepcopy(model), method, batches, MAPPING, sequential=False)
        errors[name] = {fqn: row.error**2 for fqn, row in report.items()}
    assert len(errors[BEST]) == 15
    for fqn, error in errors["SparseGPT"].items():
        assert error < errors["Wanda"][fqn], fqn
        assert errors[BEST][fqn] < error, fqn
    ratios = [errors[BEST][fqn] / error for fqn, error in errors["SparseGPT"].items()]
    assert statistics.mean(ratios) <= 0.8


def test_perplexity_follows(learned):
    """By more than three standard errors of the difference, sequence by sequence."""
    model, batches, held_out = learned
    found = {"dense": judge(model, held_out, 1024)}
    for name in (BEST, "SparseGPT", "magnitude"):
        pruned, _ = fxs.prune(copy.deepcopy(model), METHODS[name](), batches, MAPPING)
        found[name] = judge(pruned, held_out, 1024)
    for better, worse in itertools.pairwise(found.values()):
        gap = worse - better
        assert gap.mean() > 3 * gap.std() / len(gap) ** 0.5
