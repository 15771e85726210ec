"""What was trained sparse goes through the rest of the package: QAT, quantization, lower, save."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import QATConfig

import fx_sparsity as fxs
from fx_sparsity.quantization import get_backend
from fx_sparsity.training import (
    ELSA,
    Distillation,
    GradualMagnitude,
    LowRank,
    Recovery,
    RigL,
    Sparsify,
    StraightThrough,
    recover,
)

METHODS = {
    "gradual": lambda: GradualMagnitude(every=2),
    "rigl": lambda: RigL(every=2),
    "sr-ste": lambda: StraightThrough(),
    "elsa": lambda: ELSA(end=4, every=2),
}
MAPPING = {"module_name_regex": {"0": "block:4x1 50%"}}
X = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def train(model, optimizer, steps=6):
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(X), X[:, :8]).backward()
        optimizer.step()


def trained(kind):
    model, method = network(), METHODS[kind]()
    fxs.prepare(model, method, (X,), MAPPING)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = Sparsify(model, method, optimizer)
    train(model, optimizer)
    run.remove()
    return fxs.squash(model, method)


def recovered(train):
    teacher = network().eval()
    model, sparsifier = copy.deepcopy(teacher), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (X,), MAPPING)
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    options = Recovery(steps=3, learning_rate=1e-2, held_out=0)
    recover(model, teacher, [X], record, options, train=train)
    return model, record


MADE = {
    **{kind: lambda kind=kind: trained(kind) for kind in METHODS},
    "recovered": lambda: recovered("kept"),
    "low rank": lambda: recovered(LowRank(4)),
}


@pytest.mark.parametrize("kind", sorted(MADE))
def test_a_trained_model_is_quantized_lowered_and_saved(kind, tmp_path):
    model, record = MADE[kind]()
    model = model.eval()
    expected = model(X)
    quantized, _ = get_backend("eager").quantize(model, (X,), fxs.find_weights(model, (X,)))
    verdict = fxs.verify(quantized, record)
    assert verdict
    assert verdict[0].dtype == "qint8"
    lowered, report = fxs.lower(copy.deepcopy(model), (X,), policy={"0": "block"}, record=record)
    assert list(report.lowered) == ["0.weight"]
    torch.testing.assert_close(lowered(X), expected)
    fxs.save(model, tmp_path / "model.safetensors")
    again = network().eval()
    fxs.load(tmp_path / "model.safetensors", model=again)
    assert torch.equal(again(X), expected)
    record.save(tmp_path / "record")
    assert fxs.verify(again, fxs.SparsityRecord.load(tmp_path / "record"))


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_qat_trains_with_masks_that_move(kind):
    method, masks = METHODS[kind](), []

    def learn(prepared):
        optimizer = torch.optim.AdamW(prepared.parameters(), lr=1e-2)
        run = Sparsify(prepared, method, optimizer)
        for _ in range(6):
            train(prepared, optimizer, 1)
            masks.append(method.get_mask(method.names[0]).clone())
        run.remove()

    _, verdict = fxs.sparsify_and_quantize(
        network().eval(),
        method,
        (X,),
        order="qat",
        backend="eager",
        mapping=MAPPING,
        calibrate=learn,
    )
    assert verdict
    assert verdict[0].dtype == "qint8"
    assert any(not torch.equal(mask, masks[-1]) for mask in masks)


def test_int4_fake_quantization_of_torchao_under_masks_that_move():
    model, method = network(), RigL(every=2)
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    )
    quantize_(model, QATConfig(config, step="prepare"))
    fxs.prepare(model, method, None, MAPPING)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = Sparsify(model, method, optimizer)
    train(model, optimizer)
    run.remove()
    model, record = fxs.squash(model, method)
    quantize_(model, QATConfig(config, step="convert"))
    verdict = fxs.verify(model, record)
    assert verdict
    assert "int" in verdict[0].dtype


def test_accelerate_and_an_average_of_weights():
    model, method = network(), RigL(every=2)
    fxs.prepare(model, method, (X,), MAPPING)
    plain, twin = copy.deepcopy((model, method))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    run = Sparsify(model, method, optimizer)
    for _ in range(12):
        with accelerator.accumulate(model):
            accelerator.backward(F.mse_loss(model(X), X[:, :8]))
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
    run.remove()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    run = Sparsify(plain, twin, reference)
    train(plain, reference, 6)
    assert method.trained == twin.trained == 6
    torch.testing.assert_close(plain[0].weight, model[0].weight)
    mask = average.module[0].parametrizations.weight[0].mask
    assert torch.equal(mask, method.get_mask("0.weight"))
    assert not average.module[0].weight[~mask].any()


def test_distillation_of_a_compiled_model():
    teacher, model = network().eval(), network()
    sparsifier = fxs.WeightNormSparsifier()
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    fxs.prepare(model, sparsifier, (X,), MAPPING)
    sparsifier.step()
    expected = float(Distillation(model, teacher)(X).loss.detach())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = Distillation(compiled, teacher)(X)
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-5)
