import torch
from torch import nn

from fx_sparsity.storage import parameters_on_meta
from tests.models import TiedLanguageModel


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", 1 / 2 ** torch.arange(4.0), persistent=False)
        self.one = self.two = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
        self.bias = None
        self.register_parameter("none", None)
        self.norm = nn.BatchNorm1d(3)


def test_parameters_have_no_data_and_buffers_have():
    with parameters_on_meta():
        model = Rotary()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(model.frequencies, torch.tensor([1.0, 0.5, 0.25, 0.125]))
    assert torch.equal(model.norm.running_var, torch.ones(3))
    assert model.one is model.two
    assert not model.one.requires_grad
    assert model.codes.dtype == torch.int8
    assert model.none is None
    assert Rotary().one.device.type == "cpu"


def test_ties_stay():
    with parameters_on_meta():
        model = TiedLanguageModel()
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.is_meta
    assert list(model.state_dict()) == list(TiedLanguageModel().state_dict())


def test_what_code_noted_on_a_parameter_stays():
    with parameters_on_meta():
        parameter = nn.Parameter(torch.zeros(2))
        parameter.shard = 3
        module = nn.Module()
        module.weight = parameter
    assert module.weight.shard == 3
