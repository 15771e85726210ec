"""`Sparsify` in `transformers.Trainer` and in Lightning: resumed, it is as if it had never ended."""

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fx_sparsity as fxs
from fx_sparsity.training import TrainingMethod
from fx_sparsity.training.lightning import SparsifyCallback as LightningSparsify
from fx_sparsity.training.trainer import ResumeError, SparsifyCallback

NUMBERS = {"sparsity/density", "sparsity/threshold", "sparsity/churn"}
METHODS = {"gradual": TrainingMethod}


def prepared(model, kind):
    """Masks of one method; gradual pruning is in the middle of its schedule after two steps."""
    method = METHODS[kind](every=1)
    mapping = fxs.SparsityMapping().set_module_name_regex(r"model\.layers|^0", "unstructured 80%")
    fxs.prepare(model, method, None, mapping)
    return method, fxs.CubicSL(method, delta_t=1, total_t=3) if kind == "gradual" else None


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# -- transformers --------------------------------------------------------------------------------


class Seen(TrainerCallback):
    """What other callbacks, such as TensorBoard's, are told."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trainer(folder, steps, kind, accumulate=2, checkpointing=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    method, schedule = prepared(model, kind)
    text = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        activation_checkpointing=checkpointing,
        learning_rate=1e-2,
        lr_scheduler_type="constant",  # another length is no other schedule
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in text]
    seen, callback = Seen(), SparsifyCallback(method, schedule)
    made = Trainer(model, arguments, train_dataset=rows, callbacks=[seen, callback])
    callback.attach(made)
    return made, model, method, seen


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_a_trainer_resumes_in_the_middle_of_a_schedule(tmp_path, kind):
    whole, model, method, seen = trainer(tmp_path / "whole", 4, kind)
    whole.train()
    first, _, _, _ = trainer(tmp_path / "parts", 2, kind)
    first.train()
    second, resumed, again, _ = trainer(tmp_path / "parts", 4, kind)
    second.train(resume_from_checkpoint=True)
    same(model, resumed)
    assert method.trained == again.trained == 4
    training = [logs for logs in seen.logs if "loss" in logs]
    assert len(training) == 4
    assert all(set(logs) >= NUMBERS for logs in training)
    densities = [logs["sparsity/density"] for logs in training]
    assert densities[-1] == pytest.approx(0.2, abs=0.01)
    assert set(whole.state.log_history[0]) >= NUMBERS
    model, record = fxs.squash(model, method)
    assert fxs.verify(model, record)


def test_a_checkpoint_without_the_state_of_the_masks_is_told(tmp_path):
    first, _, _, _ = trainer(tmp_path, 2, "gradual")
    first.train()
    (tmp_path / "checkpoint-2" / "sparsify.pt").unlink()
    second, _, _, _ = trainer(tmp_path, 4, "gradual")
    with pytest.raises(ResumeError, match=r"step 2, but .*checkpoint-2 has no sparsify.pt"):
        second.train(resume_from_checkpoint=True)


# -- lightning -----------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch, _):
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


class Numbers(lightning.loggers.Logger):
    name, version = "numbers", 0

    def __init__(self):
        super().__init__()
        self.found = []

    def log_metrics(self, metrics, step=None):
        self.found.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


def fit(folder, steps, kind, resume=None):
    module = Module()
    method, schedule = prepared(module.net, kind)
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(16, generator=generator), torch.randn(4, generator=generator))
        for _ in range(16)  # two steps an epoch, where Lightning resumes exactly
    ]
    logger = Numbers()
    made = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=[LightningSparsify(method, schedule)],
        logger=logger,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    made.fit(module, DataLoader(data, batch_size=4), ckpt_path=resume)
    made.save_checkpoint(folder / f"{steps}.ckpt")
    return module, method, logger


@pytest.mark.filterwarnings("ignore:.*(num_workers|weights_only|isinstance).*")
@pytest.mark.parametrize("kind", sorted(METHODS))
def test_lightning_resumes_in_the_middle_of_a_schedule(tmp_path, kind):
    module, method, logger = fit(tmp_path, 4, kind)
    fit(tmp_path, 2, kind)
    resumed, again, _ = fit(tmp_path, 4, kind, tmp_path / "2.ckpt")
    same(module, resumed)
    assert method.trained == again.trained == 4
    numbers = [found for _, found in logger.found if set(found) >= NUMBERS]
    assert numbers[-1]["sparsity/density"] == pytest.approx(0.2, abs=0.01)
    net, record = fxs.squash(module.net, method)
    assert fxs.verify(net, record)
