"""`Sparsify` in `transformers.Trainer` and in Lightning: resumed, it is as if it had never ended."""

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fx_sparsity as fxs
from fx_sparsity.training import GradualMagnitude, RigL
from fx_sparsity.training.lightning import SparsifyCallback as LightningSparsify
from fx_sparsity.training.trainer import ResumeError, SparsifyCallback

NUMBERS = {"sparsity/density", "sparsity/threshold", "sparsity/churn"}
METHODS = {"gradual": GradualMagnitude, "rigl": RigL}


def prepared(model, kind):
    """Masks of one method; gradual pruning is in the middle of its schedule after two steps."""
    method = METHODS[kind](every=1, end=4)
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


def trainer(folder, kind, resume_from=None, **options):
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
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"learning_rate": 1e-2, **options},
    )
    rows = [{"input_ids": row, "labels": row} for row in text]
    seen, callback = Seen(), SparsifyCallback(method, schedule, resume_from)
    made = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=[seen, callback]
    )
    callback.attach(made)
    return made, model, method, seen


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_a_trainer_resumes_in_the_middle_of_a_schedule(tmp_path, kind):
    whole, model, method, seen = trainer(tmp_path / "whole", kind)
    whole.train()
    half = tmp_path / "whole" / "checkpoint-2"
    second, resumed, again, _ = trainer(tmp_path / "again", kind, half)
    second.train(resume_from_checkpoint=str(half))
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
    first, _, _, _ = trainer(tmp_path / "first", "gradual")
    first.train()
    second, _, _, _ = trainer(tmp_path / "second", "gradual")
    with pytest.raises(ResumeError, match=r"step 2, but .*second/checkpoint-2 has no sparsify.pt"):
        second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    second, _, _, _ = trainer(tmp_path / "second", "gradual", learning_rate=0.5)
    second.train()
    third, _, _, _ = trainer(tmp_path / "second", "gradual")
    with pytest.raises(ResumeError, match=r"second/checkpoint-2 has another mask of model"):
        third.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))


def test_the_best_model_has_the_masks_and_the_levels_that_it_was_saved_with(tmp_path, caplog):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    made, model, method, _ = trainer(
        tmp_path, "gradual", **best, metric_for_best_model="eval_loss", greater_is_better=True
    )
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    assert "of step 2, from before the masks were done" in caplog.text
    assert method.trained == 2
    model, record = fxs.squash(model, method)
    assert fxs.verify(model, record).ok
    for name, entry in record.items():
        zeros = float((model.get_parameter(name) == 0).float().mean())
        assert entry.level == pytest.approx(zeros, abs=0.01)


# -- lightning -----------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        self.masked_when_clipped = []

    def training_step(self, batch, _):
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        weight = self.net[0].parametrizations.weight
        masked = weight.original.grad[~weight[0].keep]
        self.masked_when_clipped.append(float(masked.abs().sum()))
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

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


def fit(folder, kind, resume=None):
    module = Module()
    method, schedule = prepared(module.net, kind)
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(16, generator=generator), torch.randn(4, generator=generator))
        for _ in range(16)
    ]
    logger = Numbers()
    saved = lightning.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1)
    made = lightning.Trainer(
        max_epochs=2,  # of two steps; Lightning resumes exactly at the end of one
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        callbacks=[LightningSparsify(method, schedule), saved],
        logger=logger,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    made.fit(module, DataLoader(data, batch_size=4), ckpt_path=resume)
    return module, method, logger


@pytest.mark.filterwarnings("ignore:.*(num_workers|weights_only|isinstance).*")
def test_lightning_clips_the_gradients_of_what_is_kept_alone(tmp_path):
    module, _, logger = fit(tmp_path, "rigl")
    assert module.masked_when_clipped == [0.0] * 4
    assert [step for step, found in logger.found if set(found) >= NUMBERS] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:.*(num_workers|weights_only|isinstance).*")
@pytest.mark.parametrize("kind", sorted(METHODS))
def test_lightning_resumes_in_the_middle_of_a_schedule(tmp_path, kind):
    module, method, logger = fit(tmp_path / "whole", kind)
    resumed, again, _ = fit(tmp_path / "again", kind, tmp_path / "whole" / "step=2.ckpt")
    same(module, resumed)
    assert method.trained == again.trained == 4
    numbers = [found for _, found in logger.found if set(found) >= NUMBERS]
    assert numbers[-1]["sparsity/density"] == pytest.approx(0.2, abs=0.01)
    net, record = fxs.squash(module.net, method)
    assert fxs.verify(net, record)
