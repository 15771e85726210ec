"""The Lightning callbacks of torch.ao: what theirs give, ours give, on the same training."""

import copy

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fx_sparsity.compat.torch_ao import (
    BaseDataScheduler,
    DataNormSparsifier,
    PostTrainingDataSparsity,
    TrainingAwareDataSparsity,
)

OPTIONS = {"sparsity_level": 0.5, "sparse_block_shape": (1, 4), "zeros_per_block": 4}


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    def training_step(self, batch, _):
        return F.mse_loss(self.model(batch), batch[:, :4])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Doubling(BaseDataScheduler):
    """The level is 1/8, 1/4, 1/2 of what the configuration says, and so on."""

    def get_schedule_param(self):
        return {
            name: base * min(1.0, 2.0**self.last_epoch / 4)
            for name, base in self.base_param.items()
        }


def fitted(callback, epochs=3):
    module = Module()
    data = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=4))
    return module


def by_hand(model, level):
    sparsifier = DataNormSparsifier(**{**OPTIONS, "sparsity_level": level})
    for name, parameter in copy.deepcopy(model).named_parameters():
        sparsifier.add_data(name, parameter)
    sparsifier.step()
    return {name: sparsifier.get_data(name, return_original=False) for name in sparsifier.names}


@pytest.mark.filterwarnings("ignore:.*(num_workers|isinstance).*")
def test_after_training_a_copy_is_sparsified():
    callback = PostTrainingDataSparsity(DataNormSparsifier, OPTIONS)
    module = fitted(callback)
    expected = by_hand(module.model, 0.5)
    for name, parameter in callback.sparsified.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert all(bool((p != 0).all()) for p in module.model.parameters())
    assert callback.data_sparsifier.names == ["0_weight", "0_bias", "1_weight", "1_bias"]


@pytest.mark.filterwarnings("ignore:.*(num_workers|isinstance).*")
def test_in_training_the_level_moves_epoch_by_epoch():
    options = {"schedule_param": "sparsity_level"}
    callback = TrainingAwareDataSparsity(DataNormSparsifier, OPTIONS, Doubling, options)
    module = fitted(callback)
    expected = by_hand(module.model, 0.5)
    for name, parameter in callback.sparsified.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert callback.data_sparsifier_state_dict["data_groups"]["0_weight"]["sparsity_level"] == 0.5
