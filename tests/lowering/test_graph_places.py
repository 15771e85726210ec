"""How many tokens the layers of a graph are called with."""

import pytest
import torch
from torch import fx, nn

import fx_sparsity as fxs
from fx_sparsity.lowering.graph_places import node_places, watch_nodes
from fx_sparsity.quantization import get_backend
from fx_sparsity.quantization.pt2e import default_quantizer

X = torch.randn(3, 5, 16)


class Functional(nn.Module):
    """A layer that is no module, so that a trace of it has a node for it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def traced():
    return fx.symbolic_trace(Functional())


def converted(dynamic):
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    quantizer = default_quantizer(dynamic=dynamic)
    weights = fxs.find_weights(model, (X,))
    return get_backend("pt2e").quantize(model, (X,), weights, config=quantizer).model


@pytest.mark.parametrize(
    "graph_module", [traced, lambda: converted(True), lambda: converted(False)]
)
def test_tokens_are_read_off_the_example_inputs(graph_module):
    graph_module = graph_module()
    code = graph_module.code
    places = list(node_places(graph_module))
    watch_nodes(graph_module, places, (X,))
    assert [(place.tokens, place.dtypes) for place in places] == [({15}, {torch.float32})]
    assert graph_module.code == code


def test_inputs_that_a_graph_rejects():
    with pytest.raises(fxs.FxSparsityError):
        fxs.lower(traced(), (torch.randn(3, 4),))
