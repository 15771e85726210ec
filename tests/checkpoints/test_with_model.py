"""`sparsify_checkpoint(model=)`: the model's graph says what the tensors of a checkpoint are."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    SwinConfig,
    SwinForImageClassification,
)

import fx_sparsity as fxs
from fx_sparsity.checkpoints import CheckpointError
from fx_sparsity.masks import tiling_holds
from fx_sparsity.patterns import SparsityConfig

IDS = {"input_ids": torch.arange(6).reshape(1, 6)}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}


def gpt2():
    """Stores its matrices as [in, out], and ties its head."""
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96)).eval()


def mixtral():
    """Stacks its experts."""
    config = MixtralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    return MixtralForCausalLM(config).eval()


def swin():
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4}
    config = SwinConfig(**sizes, depths=[1, 1], num_heads=[2, 2])
    return SwinForImageClassification(config).eval()


CASES = {gpt2: IDS, mixtral: IDS, swin: {"pixel_values": torch.randn(1, 3, 32, 32)}}


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("layout", ["dense", "compressed"])
def test_zeros_are_where_the_loaded_model_would_have_them(make, layout, tmp_path):
    torch.manual_seed(0)
    model = make()
    fxs.export(model, tmp_path / "a.safetensors")
    with torch.device("meta"):
        empty = make()
    mapping = {"global": "unstructured 50%", "object_type": {"linear": "2:4"}}
    report = fxs.sparsify_checkpoint(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        mapping,
        layout=layout,
        model=empty,
        example_inputs=CASES[make],
    )
    weights = fxs.find_weights(model, CASES[make])
    method = fxs.WeightNormSparsifier()
    masked = [fqn for fqn in weights if report[fqn].pattern is not None]
    fxs.prepare(model, method, CASES[make], {"module_name": {n: report[n].pattern for n in masked}})
    method.step()
    found = fxs.load(tmp_path / "b.safetensors")
    assert len(masked) >= 5
    for fqn in masked:
        assert report[fqn].roles == weights[fqn].roles
        config = SparsityConfig.parse(report[fqn].pattern)
        tiling = config.pattern.tiling(weights[fqn].shape, weights[fqn].roles)
        assert tiling_holds(found[fqn] == 0, tiling, config.level), fqn
        assert int((found[fqn] == 0).sum()) == int((~method.get_mask(fqn)).sum())
    for other in weights.dense:
        assert report[other.fqn].pattern is None
        assert report[other.fqn].reason == other.text
    fqn = {gpt2: "transformer.h.0.mlp.c_fc.weight"}.get(make)
    if fqn is not None:
        assert report[fqn].roles == ("in", "out")
        assert report["transformer.wte.weight"].pattern == "unstructured 50%"


def test_classes_tell_without_inputs_and_entries_may_name_them(tmp_path):
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16), nn.Linear(16, 8))
    fxs.export(model, tmp_path / "a.safetensors")
    mapping = fxs.SparsityMapping().set_object_type(nn.Embedding, "rows 25%")
    by_class = fxs.sparsify_checkpoint(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", mapping, model=model
    )
    assert by_class["0.weight"].roles == ("row", "dim")
    assert by_class["1.weight"].pattern is None
    by_name = fxs.sparsify_checkpoint(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "2:4")
    assert by_name["0.weight"].roles == ("out", "in")  # nothing in the name says otherwise


def test_roles_that_are_given_win_and_other_names_are_judged_by_name(tmp_path):
    tensors = {"weight": torch.randn(8, 8), "extra.embed.weight": torch.randn(8, 8)}
    save_file(tensors, tmp_path / "a.safetensors")
    report = fxs.sparsify_checkpoint(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "2:4",
        model=nn.Linear(8, 8),
        roles={"weight": ("in", "out")},
    )
    assert report["weight"].roles == ("in", "out")
    assert report["extra.embed.weight"].roles == ("row", "dim")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(8, 4), r"weight: expected shape \(4, 8\) as in the model, found \(8, 8\)"),
        (nn.Sequential(nn.Linear(8, 8)), r"none of its 1 weights has a name in the checkpoint"),
    ],
)
def test_another_model_is_refused(model, message, tmp_path):
    save_file({"weight": torch.randn(8, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        fxs.sparsify_checkpoint(
            tmp_path / "a.safetensors", tmp_path / "b.safetensors", "2:4", model=model
        )
    assert not (tmp_path / "b.safetensors").exists()


def test_the_file_that_is_read_back_is_whole(tmp_path):
    """Tied names are those of the model, too: the head is one with the table."""
    torch.manual_seed(0)
    model = gpt2()
    model.save_pretrained(tmp_path / "src")
    (tmp_path / "src" / "config.json").unlink()  # nothing but the model says what is tied
    report = fxs.sparsify_checkpoint(
        tmp_path / "src",
        tmp_path / "dst",
        {"global": "2:4", "module_name": {"lm_head": None}},
        model=model,
        example_inputs=IDS,
    )
    assert report["transformer.wte.weight"].pattern is None
    assert (
        load_file(tmp_path / "dst" / "model.safetensors").keys()
        == load_file(tmp_path / "src" / "model.safetensors").keys()
    )
