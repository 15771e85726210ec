"""One clear error each, and the model unchanged."""

import copy

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.graph import MappingError
from fx_sparsity.quantization import BACKENDS, BackendError, get_backend, sparsify_and_quantize
from fx_sparsity.sparsifier import MaskError
from tests.models import make
from tests.sparsifier.test_base import assert_unchanged, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")
MAPPING = fxs.SparsityMapping().set_global("2:4")


def masked():
    model, inputs = make("sequential")
    weights = fxs.find_weights(model, inputs)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, MAPPING)
    sparsifier.step()
    return model, inputs, weights, sparsifier


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_live_masks_are_named(backend, qat):
    model, inputs, weights, _ = masked()
    before = snapshot(model)
    with pytest.raises(BackendError, match=r"0.weight, 2.weight still masked; squash before"):
        get_backend(backend).prepare(model, inputs, weights, qat=qat)
    assert_unchanged(model, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_live_masks_in_a_graph_are_named(backend):
    model, inputs = make("sequential")
    graph = torch.export.export(model, inputs).module()
    weights = fxs.find_weights(graph)
    fxs.prepare(graph, fxs.WeightNormSparsifier(), mapping=MAPPING)
    with pytest.raises(BackendError, match=r"0.weight, 2.weight still masked"):
        get_backend(backend).quantize(graph, inputs, weights)


@pytest.mark.parametrize("order", ["sparsify_first", "quantize_first", "interleaved", "qat"])
def test_a_sparsifier_that_is_in_use(order):
    squashed, inputs, _, sparsifier = masked()
    fxs.squash(squashed, sparsifier)
    model, _ = make("sequential")
    with pytest.raises(MaskError, match=r"already holds 0.weight, 2.weight; give a fresh one"):
        sparsify_and_quantize(
            model,
            sparsifier,
            inputs,
            order=order,
            backend="eager",
            mapping=MAPPING,
            calibrate=lambda prepared: None,
        )


@pytest.mark.parametrize("backend", ["eager", "fx", "torchao", "pt2e"])
def test_masks_for_a_model_that_is_quantized_already(backend):
    model, inputs = make("sequential")
    quantized = get_backend(backend).quantize(model, inputs, fxs.find_weights(model, inputs)).model
    before = copy.deepcopy(quantized)
    with pytest.raises(MaskError, match="no weight to mask.*sparsify_codes"):
        fxs.prepare(quantized, fxs.WeightNormSparsifier(), inputs, MAPPING)
    with pytest.raises((MappingError, MaskError), match="0.weight"):
        fxs.prepare(
            quantized,
            fxs.WeightNormSparsifier(),
            inputs,
            fxs.SparsityMapping().set_module_name("0.weight", "2:4"),
        )
    torch.testing.assert_close(quantized(*inputs), before(*inputs))


def test_qat_needs_something_that_trains():
    model, inputs = make("sequential")
    with pytest.raises(ValueError, match="expected `calibrate`, a function that trains the model"):
        sparsify_and_quantize(
            model, fxs.WeightNormSparsifier(), inputs, order="qat", backend="eager", mapping=MAPPING
        )


@pytest.mark.parametrize("backend", ["eager", "fx"])
def test_no_quantized_engine(backend, monkeypatch):
    class Engines:
        engine = "none"
        supported_engines = ("none", "onednn")

    monkeypatch.setattr(torch.backends, "quantized", Engines)
    model, inputs = make("sequential")
    with pytest.raises(BackendError, match=r"engine: expected one of onednn, found none"):
        get_backend(backend).quantize(model, inputs, fxs.find_weights(model, inputs))


@pytest.mark.parametrize("name", ["pt2e", "torchao"])
def test_a_missing_package_names_the_extra(name, monkeypatch):
    import sys

    for module in [m for m in sys.modules if m.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, BACKENDS[name][0], raising=False)
    with pytest.raises(BackendError, match=r'pip install "fx_sparsity\[torchao\]"'):
        get_backend(name)


def test_a_quantizer_that_fails_leaves_the_model_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(8, 4)

        def forward(self, index):
            return self.table.weight[index] @ self.table.weight.t()

    torch.manual_seed(0)
    model, inputs = Odd(), (torch.randint(8, (3,)),)
    before = snapshot(model)
    with pytest.raises(BackendError, match="does not run on example_inputs"):
        sparsify_and_quantize(
            model,
            fxs.WeightNormSparsifier(),
            inputs,
            order="sparsify_first",
            backend="eager",
            mapping=MAPPING,
        )
    assert_unchanged(model, before)
