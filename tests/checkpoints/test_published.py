"""Quantized checkpoints as compressed-tensors itself writes them, sparsified and read by it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fx_sparsity as fxs
from fx_sparsity.masks import tiling_holds
from fx_sparsity.patterns import SparsityConfig
from tests.storage.test_formats import same_bits

compressed_tensors = pytest.importorskip("compressed_tensors")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FP8 = ("FP8_DYNAMIC", "FP8_BLOCK")


def publish(folder, preset):
    """A quantized model's folder; values are those of a model with random weights."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).to(torch.bfloat16)
    scheme = preset_name_to_scheme(preset, targets=["Linear"])
    groups = {"group_0": scheme}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if isinstance(scale := getattr(module, "weight_scale", None), torch.Tensor):
            scale.data.fill_(0.5 if scale.dtype.itemsize == 1 else 0.01)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


@pytest.mark.parametrize("preset", [*FP8, "W4A16", "W8A8", "NVFP4A16"])
def test_only_weights_are_sparsified_and_the_others_stay_as_published(preset, tmp_path):
    publish(tmp_path / "src", preset)
    mapping = {
        "global": "2:4",
        "object_type": {"embedding": None},
        "module_name": {"lm_head": None},
    }
    report = fxs.sparsify_checkpoint(tmp_path / "src", tmp_path / "dst", mapping)
    before = load_file(tmp_path / "src" / "model.safetensors")
    after = load_file(tmp_path / "dst" / "model.safetensors")
    assert before.keys() == after.keys()
    masked = {name for name, row in report.items() if row.pattern is not None}
    assert len(masked) == (7 if preset in FP8 else 0)
    assert all(name.endswith("proj.weight") for name in masked)
    assert all(same_bits(before[name], after[name]) for name in before.keys() - masked)
    read = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert read == json.loads((tmp_path / "src" / "config.json").read_text())


@pytest.mark.parametrize("preset", FP8)
def test_its_own_loader_reads_zeros_and_the_values_that_were_kept(preset, tmp_path):
    publish(tmp_path / "src", preset)
    fxs.sparsify_checkpoint(
        tmp_path / "src", tmp_path / "dst", {"module_name_regex": {".*up_proj": "2:4"}}
    )
    dense, sparse = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / part).named_parameters())
        for part in ("src", "dst")
    )
    assert dense.keys() == sparse.keys()
    for name, weight in dense.items():
        if "up_proj.weight" not in name or weight.ndim < 2 or "scale" in name:
            assert same_bits(weight.data, sparse[name].data), name
            continue
        found, config = sparse[name].data, SparsityConfig.parse("2:4")
        zeros = found.float() == 0
        assert tiling_holds(zeros, config.pattern.tiling(found.shape, ("out", "in")), 0.5)
        assert torch.equal(found.float()[~zeros], weight.data.float()[~zeros])
