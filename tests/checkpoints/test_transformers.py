"""Compressed folders of transformers models: refused by those who do not know them, or loaded."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers import auto

import fx_sparsity as fxs
from fx_sparsity.checkpoints import convert
from fx_sparsity.compat import _register_with_transformers
from fx_sparsity.compat.after_import import after_import
from fx_sparsity.compat.transformers import register
from fx_sparsity.storage.sparsity_config import METHOD, as_compressed, as_dense
from tests.storage.test_formats import same_bits


@pytest.fixture(params=["1 file", "shards", "tied"])
def dense(request, tmp_path):
    """A sparse model's folder, as transformers writes it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=request.param == "tied")
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    shard = {"max_shard_size": "40KB"} if request.param == "shards" else {}
    model.save_pretrained(tmp_path / "model", **shard)
    mapping = fxs.SparsityMapping().set_global("unstructured 80%").set_module_name("lm_head", None)
    fxs.sparsify_checkpoint(tmp_path / "model", tmp_path / "dense", mapping)
    return tmp_path / "dense"


@pytest.fixture
def unregistered(monkeypatch):
    for known in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.setitem(known, METHOD, None)
        del known[METHOD]


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_whoever_does_not_know_a_compressed_folder_gets_no_model(
    cls, dense, tmp_path, unregistered
):
    convert(dense, tmp_path / "small", "compressed")
    with pytest.raises((OSError, ValueError), match="import-fx_sparsity-to-load"):
        cls.from_pretrained(tmp_path / "small")


def test_from_pretrained_gives_the_dense_model(dense, tmp_path, unregistered):
    register()
    register()
    convert(dense, tmp_path / "small", "compressed")
    expected = AutoModelForCausalLM.from_pretrained(dense)
    for options in ({}, {"dtype": "auto"}, {"dtype": torch.float32}):
        model, found = AutoModelForCausalLM.from_pretrained(
            tmp_path / "small", output_loading_info=True, **options
        )
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        expected = AutoModelForCausalLM.from_pretrained(dense, **options)
        state = model.state_dict()
        assert all(same_bits(state[name], t) for name, t in expected.state_dict().items())
    tied = expected.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & config.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_the_configuration_comes_back(dense, tmp_path):
    before = json.loads((dense / "config.json").read_text())
    small = tmp_path / "small"
    convert(dense, small, "compressed")
    said = json.loads((small / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "fx_sparsity"
    convert(small, tmp_path / "bits", "sparse-bitmask")
    convert(tmp_path / "bits", tmp_path / "small2", "compressed")
    convert(small, tmp_path / "back")
    convert(tmp_path / "small2", tmp_path / "back2")
    for folder in ("back", "back2"):
        assert json.loads((tmp_path / folder / "config.json").read_text()) == before


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"quantization_config": None, "transformers_weights": "x.safetensors"},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
    ],
)
def test_what_a_configuration_said_before_is_kept(config):
    assert as_dense(config) == config
    assert as_dense(as_compressed(config)) == config


def test_what_others_have_quantized_is_refused_when_it_is_loaded(dense, tmp_path, unregistered):
    register()
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (dense / "config.json").write_text(json.dumps(config))
    convert(dense, tmp_path / "small", "compressed")
    with pytest.raises(ValueError, match="quantized by 'fp8', too"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


LOADING = """
import sys
{imports}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert float(model.lm_head.weight.abs().sum()) == float(sys.argv[2])
"""


@pytest.mark.parametrize("dense", ["1 file"], indirect=True)
@pytest.mark.parametrize(
    "imports",
    [
        "import fx_sparsity, transformers",
        pytest.param("import transformers, fx_sparsity", marks=pytest.mark.exhaustive),
        "import transformers; transformers.AutoModelForCausalLM; import fx_sparsity.cli.commands",
    ],
)
def test_importing_both_is_enough(imports, dense, tmp_path):
    convert(dense, tmp_path / "small", "compressed")
    expected = AutoModelForCausalLM.from_pretrained(dense).lm_head.weight.abs().sum()
    code = LOADING.format(imports=imports)
    command = [sys.executable, "-c", code, str(tmp_path / "small"), str(float(expected))]
    subprocess.run(command, check=True)


def test_a_transformers_that_is_too_old_is_told_and_goes_on_working(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "fx_sparsity.compat.transformers", None)
    _register_with_transformers()
    assert "compressed checkpoints do not load with this transformers" in caplog.text


def test_what_follows_an_import_is_called_once(tmp_path, monkeypatch):
    (tmp_path / "some_module.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    called = []
    finders = len(sys.meta_path)
    after_import("some_module", lambda: called.append(sys.modules["some_module"].value))
    assert not called
    for _ in range(2):
        import some_module

        assert some_module.value == 3
        assert called == [3]
        importlib.reload(some_module)
    assert len(sys.meta_path) == finders
    after_import("some_module", lambda: called.append(4))
    assert called == [3, 4]


def test_nothing_else_imports_transformers():
    code = "import fx_sparsity.cli.commands, sys; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
