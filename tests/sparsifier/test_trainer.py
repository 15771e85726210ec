"""`transformers.Trainer` with live masks: checkpoints in mid-training, resuming, the last model."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fx_sparsity as fxs


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
    )


def data():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (16, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


class Steps(TrainerCallback):
    """New masks after every step of the optimizer."""

    def __init__(self, sparsifier):
        self.sparsifier = sparsifier

    def on_step_end(self, args, state, control, **kwargs):
        self.sparsifier.step()


def trainer(folder, steps):
    model, sparsifier = llama(), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, {"input_ids": torch.randint(64, (2, 8))}, "2:4")
    sparsifier.step()
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",  # another length is no other schedule
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    made = Trainer(model, arguments, train_dataset=data(), callbacks=[Steps(sparsifier)])
    return made, model, sparsifier


def test_training_resumes_exactly_and_ends_in_a_plain_model(tmp_path):
    whole, model, sparsifier = trainer(tmp_path / "whole", 4)
    whole.train()
    first, _, _ = trainer(tmp_path / "parts", 2)
    first.train()
    second, resumed, state = trainer(tmp_path / "parts", 4)
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    state.load_state_dict(torch.load(checkpoint / "sparsifier.pt", weights_only=True))
    second.train(resume_from_checkpoint=str(checkpoint))
    for (name, one), other in zip(
        model.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    model, record = fxs.squash(model, sparsifier)
    whole.save_model(tmp_path / "last")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "last")
    assert fxs.verify(loaded, record)
    assert not (tmp_path / "last" / "sparsifier.pt").exists()


def test_a_checkpoint_in_mid_training_is_a_dense_model_for_everybody_else(tmp_path):
    made, model, sparsifier = trainer(tmp_path, 2)
    made.train()
    folder = tmp_path / "checkpoint-2"
    held = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    beneath = model.model.layers[0].mlp.up_proj.parametrizations.weight.original
    assert torch.equal(held[name], beneath)
    masks = [key for key in held if key.endswith(".mask")]
    assert len(masks) == len(sparsifier.names)
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, beneath)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 32


def test_a_copy_saves_itself(tmp_path):
    _, model, sparsifier = trainer(tmp_path, 2)
    both = copy.deepcopy((model, sparsifier))
    beneath = both[0].model.layers[0].mlp.up_proj.parametrizations.weight.original
    beneath.data.fill_(7)
    both[0].save_pretrained(tmp_path / "copy")
    held = load_file(tmp_path / "copy" / "model.safetensors")
    assert bool((held["model.layers.0.mlp.up_proj.weight"] == 7).all())


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_state_that_is_loaded_goes_beneath_the_mask(strict):
    model = nn.Sequential(nn.Linear(8, 8))
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, None, "unstructured 50%")
    sparsifier.step()
    mask = sparsifier.get_mask("0.weight").clone()
    state = {"0.weight": torch.ones(8, 8), "0.bias": torch.ones(8)}
    found = model.load_state_dict(state, strict=strict)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert list(state) == ["0.weight", "0.bias"]
    assert torch.equal(model[0].weight, mask.float())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"0.weight": state["0.weight"]})
    model, _ = fxs.squash(model, sparsifier)
    assert not model[0]._load_state_dict_pre_hooks
    model.load_state_dict(state)
