"""The docstring of every verb shows what a user would do, and what comes of it."""

import doctest
import inspect

import pytest
import torch
from torch import nn

import fx_sparsity as fxs


@pytest.mark.parametrize("name", fxs.__all__)
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_the_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    subject = getattr(fxs, name)
    namespace = {"torch": torch, "nn": nn, "fxs": fxs}
    (examples,) = doctest.DocTestFinder(recurse=False).find(subject, name, globs=namespace)
    assert examples.examples or not inspect.isfunction(subject), "a verb without an example"
    said = []
    assert doctest.DocTestRunner().run(examples, out=said.append).failed == 0, "".join(said)
