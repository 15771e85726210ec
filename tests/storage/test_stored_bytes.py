"""What `stored_bytes` says is what the tensors of a file take."""

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fx_sparsity as fxs
from fx_sparsity.pruning.sensitivity import _other_bytes
from fx_sparsity.quantization.any_use import int8_any_use
from fx_sparsity.storage import CompressedFile, stored_bytes


def layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False))
    model[0].weight.data[torch.rand(64, 64) < 0.8] = 0
    return model


def by_torchao():
    quantize_(model := layers(), Int8WeightOnlyConfig())
    return model


def any_use():
    model = layers()
    for layer in model:
        layer.weight = nn.Parameter(int8_any_use(layer.weight, (1,)), requires_grad=False)
    return model


def test_of_codes_it_is_what_the_file_has(tmp_path):
    for i, model in enumerate([layers(), by_torchao(), any_use()]):
        fxs.save(model, path := tmp_path / f"{i}.safetensors")
        file = CompressedFile(path)
        written = sum(file.stored_bytes(name) for name in file.names)
        state = model.state_dict()
        assert sum(map(stored_bytes, state.values())) == written
        assert _other_bytes(model, []) == written
    quantized = torch.quantize_per_tensor(layers()[0].weight.detach(), 0.01, 3, torch.quint8)
    fxs.save({"w": quantized}, path := tmp_path / "q.safetensors")
    file = CompressedFile(path)
    assert stored_bytes(quantized) == sum(file.stored_bytes(name) for name in file.names)
