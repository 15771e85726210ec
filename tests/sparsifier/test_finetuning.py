"""Zeros through training, plain checkpoints, and models that come from elsewhere."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import prune
from torch.optim import swa_utils

import fx_sparsity as fxs
from fx_sparsity.patterns import PatternError
from fx_sparsity.pruning.methods import RandomSparsifier
from fx_sparsity.sparsifier import (
    MaskError,
    dense_state_dict,
    load_dense_state_dict,
    take_over_pruned,
)
from fx_sparsity.verification import SparsityLostError
from tests.models import make
from tests.sparsifier.test_base import assert_unchanged, snapshot

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def sparse_model():
    model, inputs = make("sequential")
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    return model, inputs, sparsifier


def train(model, inputs, optimizer, scaler=None, accumulate=1, steps=100):
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            loss = (model(*inputs) - 1).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return loss.item()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(("scaled", "accumulate"), [(False, 1), (True, 3)])
def test_zeros_survive_a_hundred_steps(name, live, scaled, accumulate):
    model, inputs, sparsifier = sparse_model()
    first = (model(*inputs) - 1).square().mean().item()
    if live:
        optimizer = OPTIMIZERS[name](model.parameters())
    else:
        model, record = fxs.squash(model, sparsifier)
        optimizer = OPTIMIZERS[name](model.parameters())
        fxs.hold(optimizer, model, record)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    assert train(model, inputs, optimizer, scaler, accumulate) < first
    if live:
        model, record = fxs.squash(model, sparsifier)
    fxs.verify(model, record).raise_if_lost()
    for fqn, mask in record.items():
        weight = model.get_parameter(fqn)
        assert weight[~mask.keep].eq(0).all()
        if not live:
            for value in optimizer.state[weight].values():
                if value.shape == weight.shape:
                    assert value[~mask.keep].eq(0).all()


def test_without_hold_the_zeros_are_lost_and_the_gate_says_so():
    model, inputs, sparsifier = sparse_model()
    model, record = fxs.squash(model, sparsifier)
    train(model, inputs, OPTIMIZERS["adamw"](model.parameters()), steps=3)
    with pytest.raises(SparsityLostError, match=r"0.weight: \d+ of 64 zeros lost"):
        fxs.verify(model, record).raise_if_lost()


def test_a_merge_that_fills_zeros_is_caught_and_held_again():
    model, inputs, sparsifier = sparse_model()
    model, record = fxs.squash(model, sparsifier)
    held = fxs.hold(OPTIMIZERS["sgd"](model.parameters()), model, record)
    with torch.no_grad():
        model[0].weight += torch.randn(16, 2) @ torch.randn(2, 8)
    assert not fxs.verify(model, record).ok
    held.apply()
    assert fxs.verify(model, record).ok
    held.remove()
    train(model, inputs, held._optimizer, steps=2)
    assert not fxs.verify(model, record).ok


def test_hold_wants_squashed_weights_of_the_recorded_shape():
    model, inputs, sparsifier = sparse_model()
    with pytest.raises(MaskError, match=r"0.weight is still masked; squash first"):
        fxs.hold(OPTIMIZERS["sgd"](model.parameters()), model, fxs.SparsityRecord.of(sparsifier))
    model, record = fxs.squash(model, sparsifier)
    with pytest.raises(MaskError, match=r"0.weight: expected a weight of shape"):
        fxs.hold(OPTIMIZERS["sgd"](model.parameters()), nn.Linear(2, 2), record)


def test_plain_checkpoints_go_in_and_out_while_masks_are_on():
    model, inputs, sparsifier = sparse_model()
    before = snapshot(model)
    dense = dense_state_dict(model)
    assert_unchanged(model, before)
    plain, _ = make("sequential")
    plain.load_state_dict(dense, strict=True)
    assert torch.equal(plain(*inputs), model(*inputs))

    torch.manual_seed(7)
    other = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    masks = {name: sparsifier.get_mask(name).clone() for name in sparsifier.names}
    load_dense_state_dict(model, other.state_dict())
    assert torch.equal(sparsifier.get_data("0.weight"), other[0].weight)
    assert all(torch.equal(sparsifier.get_mask(n), m) for n, m in masks.items())
    with pytest.raises(RuntimeError, match="Missing key"):
        load_dense_state_dict(model, {"0.weight": torch.zeros(16, 8)})


def test_assigning_a_state_keeps_mask_and_sparsifier_together():
    model, inputs, sparsifier = sparse_model()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    sparsifier.get_mask("0.weight").zero_()
    assert model[0].weight.eq(0).all()
    assert sparsifier.get_data("0.weight") is model[0].parametrizations.weight.original
    model, _ = fxs.squash(model, sparsifier)
    assert model[0].weight.eq(0).all()


def test_models_pruned_by_torch_are_taken_over():
    model, inputs = make("sequential")
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    prune.random_unstructured(model[2], "weight", amount=0.5)
    expected = model(*inputs)
    original = model[0].weight_orig
    mask = model[0].weight_mask.clone()
    sparsifier = fxs.WeightNormSparsifier()
    assert take_over_pruned(model, sparsifier) == ["0.weight", "2.weight"]
    assert torch.equal(model(*inputs), expected)
    assert sparsifier.get_data("0.weight") is original
    assert torch.equal(sparsifier.get_mask("0.weight"), mask)
    model, record = fxs.squash(model, sparsifier)
    assert torch.equal(model(*inputs), expected)
    assert record["2.weight"].keep.double().mean() == 0.5
    with pytest.raises(MaskError, match="no weight pruned"):
        take_over_pruned(model, fxs.WeightNormSparsifier())


def test_transformers_models_save_and_tie(tmp_path, caplog):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(64, (1, 8))}
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    expected = model(**inputs).logits
    model.tie_weights()
    assert torch.equal(model(**inputs).logits, expected)
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path)
    assert "call squash(model, sparsifier) first" in caplog.text
    model.save_pretrained(tmp_path / "live", state_dict=dense_state_dict(model))
    model, _ = fxs.squash(model, sparsifier)
    model.save_pretrained(tmp_path / "squashed")
    for folder in ("live", "squashed"):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded(**inputs).logits, expected)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("ema", [True, False])
def test_averages_have_the_masks_of_the_model(use_buffers, ema):
    model, inputs, sparsifier = sparse_model()
    options = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.5)} if ema else {}
    averaged = swa_utils.AveragedModel(model, use_buffers=use_buffers, **options)
    seen = []
    for step in range(3):
        train(model, inputs, OPTIMIZERS["sgd"](model.parameters()), steps=1)
        seen.append(sparsifier.get_data("0.weight").detach().clone())
        averaged.update_parameters(model)
        if step < 2:
            sparsifier.step()
    expected = seen[0]
    for i, weight in enumerate(seen[1:], start=1):
        expected = (expected + weight) / 2 if ema else expected + (weight - expected) / (i + 1)
    keep = sparsifier.get_mask("0.weight")
    found = averaged.module[0]
    assert torch.equal(found.parametrizations.weight[0].keep, keep)
    assert torch.allclose(found.parametrizations.weight.original, expected, atol=1e-6)
    assert torch.equal(found.weight == 0, (expected * keep) == 0)
    copied = copy.deepcopy(averaged)
    copied.update_parameters(model)
    assert torch.equal(averaged.module[0].weight, found.weight)
    assert averaged(*inputs).shape == model(*inputs).shape


def _train_in_parallel(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, _, sparsifier = sparse_model()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = OPTIMIZERS["sgd"](parallel.parameters())
    torch.manual_seed(rank)
    train(parallel, (torch.randn(4, 8),), optimizer, steps=5)
    sparsifier.step()
    train(parallel, (torch.randn(4, 8),), optimizer, steps=5)
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(MaskError, match="put the masks on first, then wrap the model"):
        fxs.WeightNormSparsifier().prepare(wrapped)
    assert not nn.utils.parametrize.is_parametrized(wrapped.module[0])
    _, record = fxs.squash(parallel, sparsifier)
    fxs.verify(parallel, record).raise_if_lost()
    fxs.verify(model, record).raise_if_lost()
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_data_parallel_ranks_train_and_agree(tmp_path):
    mp.spawn(_train_in_parallel, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _differ(rank, folder, broadcast):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, inputs = make("sequential")
    sparsifier = RandomSparsifier(seed=rank)
    fxs.prepare(model, sparsifier, inputs, "unstructured 50%")
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
    optimizer = OPTIMIZERS["sgd"](parallel.parameters())
    sparsifier.step()
    train(parallel, inputs, optimizer, steps=2)
    masks = {name: sparsifier.get_mask(name).clone() for name in sparsifier.names}
    for call in (sparsifier.step, lambda: fxs.squash(parallel, sparsifier)):
        with pytest.raises(MaskError, match=rf"2 masks differ between ranks {rank} and {1 - rank}"):
            call()
    assert all(torch.equal(masks[name], sparsifier.get_mask(name)) for name in masks)
    dist.destroy_process_group()


@pytest.mark.parametrize("broadcast", [True, False])
def test_ranks_whose_masks_differ_are_noticed(broadcast, tmp_path):
    mp.spawn(_differ, (tmp_path, broadcast), nprocs=2)


def _step_on_one_rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, inputs = make("sequential")
    sparsifier = RandomSparsifier()
    fxs.prepare(model, sparsifier, inputs, "unstructured 50%")
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        if rank == 0:
            sparsifier.step()
        train(parallel, inputs, OPTIMIZERS["sgd"](parallel.parameters()), steps=1)
    parallel(*inputs)
    _, record = fxs.squash(parallel, sparsifier)
    torch.save({name: mask.keep for name, mask in record.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_rank_0_may_step_alone(tmp_path):
    mp.spawn(_step_on_one_rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not first["0.weight"].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16,), (4, 8), (2, 4, 8), (2, 3, 4, 8), (2, 2, 3, 4, 8)])
def test_every_dtype_and_rank_is_masked_exactly(dtype, shape):
    model = nn.Module()
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    model.register_parameter("plain", nn.Parameter(weight.clone()))
    order = tuple(reversed(range(len(shape))))
    strided = weight.permute(order).contiguous().permute(order)
    model.register_parameter("strided", nn.Parameter(strided))
    sparsifier = fxs.WeightNormSparsifier(0.5, sparse_block_shape=(1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": "plain"}, {"tensor_fqn": "strided"}])
    sparsifier.step()
    assert sparsifier.get_mask("plain").dtype == dtype
    assert sparsifier.get_mask("plain").eq(0).sum() == weight.numel() // 2
    assert torch.equal(sparsifier.get_mask("plain"), sparsifier.get_mask("strided"))
    sparsifier.squash_mask()
    assert model.plain.dtype == dtype
    assert torch.equal(model.plain, model.strided)


def test_frozen_weights_beneath_lora_factors_are_held():
    model, _, sparsifier = sparse_model()
    model, record = fxs.squash(model, sparsifier)
    factors = [nn.Parameter(torch.randn(16, 2)), nn.Parameter(torch.randn(2, 8))]
    held = fxs.hold(OPTIMIZERS["sgd"](factors), model, record)
    with torch.no_grad():
        model[0].weight += factors[0] @ factors[1]
    held.apply()
    assert fxs.verify(model, record).ok


def test_a_refused_take_over_leaves_the_pruning():
    model = nn.Sequential(nn.Linear(10, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    before = snapshot(model)
    sparsifier = fxs.WeightNormSparsifier()
    sparsifier.defaults["pattern"] = "2:4"
    with pytest.raises(PatternError, match=r"0.weight"):
        take_over_pruned(model, sparsifier)
    assert_unchanged(model, before)
    model(torch.randn(2, 10))
    assert model[0].weight.eq(0).sum() == 20


def test_masks_taken_over_claim_no_pattern():
    model, _ = make("sequential")
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    sparsifier = fxs.WeightNormSparsifier()
    take_over_pruned(model, sparsifier)
    model, record = fxs.squash(model, sparsifier)
    assert record["0.weight"].pattern is None
    assert fxs.verify(model, record).ok


def test_plain_checkpoints_of_graphs():
    model, inputs = make("tied")
    gm = torch.export.export(model, inputs, strict=False).module()
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(gm, sparsifier, mapping=fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    plain, _ = make("tied")
    plain.load_state_dict(dense_state_dict(gm))
    assert torch.equal(plain(*inputs), gm(*inputs))
    other, _ = make("tied")
    with torch.no_grad():
        other.embed.weight.fill_(2)
    load_dense_state_dict(gm, other.state_dict())
    assert sparsifier.get_data("embed.weight").eq(2).all()
    assert sparsifier.get_data("embed.weight", return_original=False).eq(0).sum() == 128
