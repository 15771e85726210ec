"""Distillation and recovery: against float64 by hand, and what may not be a pair."""

import copy
import functools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fx_sparsity as fxs
from fx_sparsity.training import (
    Distillation,
    DistillationError,
    LowRank,
    Recovery,
    kl_divergence,
    recover,
)

TEXT = torch.randint(3, 64, (8, 6), generator=torch.Generator().manual_seed(1))


def llama(vocabulary=64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # so that layers matter
    return model


def pruned(dtype=torch.float32, squash=True):
    return copy.deepcopy(made(dtype, squash))


@functools.cache
def made(dtype, squash):
    teacher = llama().to(dtype)
    model, sparsifier = copy.deepcopy(teacher), fxs.WeightNormSparsifier()
    mapping = fxs.SparsityMapping().set_module_name_regex(r"model\.layers", "2:4")
    fxs.prepare(model, sparsifier, None, mapping)
    sparsifier.step()
    record = fxs.squash(model, sparsifier)[1] if squash else None
    return model, teacher, record


def batches():
    return [{"input_ids": TEXT[i : i + 2]} for i in range(0, 8, 2)]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_and_its_gradient_are_those_of_float64(temperature):
    torch.manual_seed(0)
    found, wanted = (3 * torch.randn(2, 300, 11) for _ in range(2))
    wanted[..., 3] = -torch.inf  # a token that never comes
    keep = torch.rand(2, 300) < 0.7
    mine = found.clone().requires_grad_()
    loss = kl_divergence(mine, wanted, keep, temperature)
    loss.backward()
    exact = found.double().requires_grad_()
    p, log_q = ((t / temperature).softmax(-1) for t in (wanted.double(), exact))
    terms = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q.log()), 0).sum(-1)
    reference = terms[keep].mean() * temperature**2
    reference.backward()
    torch.testing.assert_close(loss.double(), reference)
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-5, atol=1e-9)
    assert not mine.grad[~keep].any()


def test_padding_counts_for_nothing():
    model, teacher, _ = pruned()
    loss = Distillation(model, teacher, hidden=["model.layers.0"])
    short = loss({"input_ids": TEXT[:2, :4]})
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    padded = loss({"input_ids": TEXT[:2], "attention_mask": mask})
    assert (short.tokens, padded.tokens) == (8, 8)
    torch.testing.assert_close(padded.loss, short.loss)
    assert short.loss > 0


def test_embeddings_are_compared_by_their_relative_error():
    torch.manual_seed(0)
    teacher, model = nn.Linear(4, 6), nn.Linear(4, 6)
    x = torch.randn(5, 4)
    a, b = model(x).double(), teacher.eval()(x).double()
    expected = ((a - b).square().sum(1) / b.square().sum(1)).mean()
    found = Distillation(model, teacher, compare="relative")(x)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=0)
    assert found.tokens == 5


@pytest.mark.parametrize("shape", [(), (5,), (5, 1)])
def test_single_logits_have_no_divergence_and_are_told(shape):
    """One class has probability 1 in both models: the loss would be zero, and nothing learned."""
    models = [nn.Linear(4, 1) for _ in range(2)]
    options = {"read": lambda out: out.sum() if shape == () else out.view(shape)}
    loss = Distillation(models[0], models[1].eval(), **options)
    with pytest.raises(DistillationError, match="two classes or more, found shape"):
        loss(torch.randn(5, 4))
    if shape == ():
        loss = Distillation(models[0], models[1].eval(), compare="relative", **options)
        with pytest.raises(DistillationError, match="found a scalar"):
            loss(torch.randn(5, 4))


def test_blocks_are_found_around_pruned_weights():
    model, teacher, record = pruned()
    loss = Distillation(model, teacher, hidden="blocks", pruned=record)
    assert list(loss.hidden) == ["model.layers.0", "model.layers.1"]
    plain = float(Distillation(model, teacher)(batches()[0]).loss)
    hidden = Distillation(model, teacher, hidden="blocks", pruned=record, hidden_share=1.0)
    assert float(loss(batches()[0]).loss) == pytest.approx(
        (plain + float(hidden(batches()[0]).loss)) / 2
    )


def test_a_module_that_is_not_called_is_told():
    models = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
    for model in models:
        model[0].unused = nn.Linear(4, 4)
    loss = Distillation(models[0], models[1].eval(), compare="relative", hidden=["0.unused"])
    with pytest.raises(DistillationError, match="the model did not call '0.unused'"):
        loss(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("teacher", "options", "words"),
    [
        (lambda m: m, {}, "the model itself"),
        (lambda m: copy.copy(m), {}, "has this very tensor"),
        (lambda m: llama().train(), {}, r"call teacher.eval\(\)"),
        (lambda m: llama().to("meta"), {}, "move one of them"),
        (lambda m: llama(), {"hidden": ["model.layers.7"]}, "the model has no module 'model.lay"),
        (lambda m: llama(), {"hidden": "blocks"}, "no repeated blocks"),
    ],
)
def test_what_is_no_pair_is_told_by_name(teacher, options, words):
    model = llama()
    with pytest.raises(DistillationError, match=words):
        Distillation(model, teacher(model), **options)


def test_other_vocabularies_and_widths_are_told_before_the_first_step():
    model, _, record = pruned()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DistillationError, match="64 channels .* vocabulary.* teacher's 80"):
        recover(model, llama(80), batches(), record)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recovery_lowers_the_loss_and_keeps_every_zero(dtype, squash):
    model, teacher, record = pruned(dtype, squash=squash)
    masked = {n: (w == 0).clone() for n, w in _weights(model)}
    options = Recovery(steps=12, learning_rate=3e-3, autocast=torch.bfloat16)
    model, report = recover(model, teacher, batches(), record, options)
    losses = [row.loss for row in report.rows]
    assert report.after < report.before
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    for name, weight in _weights(model):
        assert torch.equal(weight == 0, masked[name]), name
    if record is not None:
        assert fxs.verify(model, record)
        kept = sum(int(entry.keep.sum()) for entry in record.values())
        assert report.trained == kept + 5 * 32
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.dtype == dtype
    assert len(report.rows) == 12
    assert "12 steps" in str(report)
    assert report.memory["teacher"] == sum(p.nbytes for p in teacher.parameters())


def _weights(model):
    return [
        (n, m.weight)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and "layers" in n
    ]


@pytest.mark.parametrize("train", ["vectors", "all", LowRank(4), ["lm_head.weight"]], ids=str)
def test_what_is_trained_is_chosen(train):
    model, teacher, record = pruned()
    before = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    options = Recovery(steps=4, learning_rate=1e-2)
    model, report = recover(model, teacher, batches(), record, options, train=train)
    changed = {
        name
        for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    expected = {
        "vectors": {n for n, p in before.named_parameters() if p.ndim == 1},
        "all": set(names),
        str(LowRank(4)): set(record),
        str(["lm_head.weight"]): {"lm_head.weight"},
    }[str(train)]
    assert changed == expected
    assert report.after < report.before
    assert fxs.verify(model, record)
    assert [name for name, _ in model.named_parameters()] == names


def test_a_tied_weight_is_chosen_by_any_of_its_names():
    model, teacher, record = pruned()
    model.lm_head.weight = model.model.embed_tokens.weight
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    options = Recovery(steps=1, learning_rate=1e-2)
    before = model.lm_head.weight.detach().clone()
    _, report = recover(model, teacher, batches(), record, options, train=names)
    assert report.trained == before.numel()
    assert not torch.equal(model.lm_head.weight, before)


def test_every_token_of_a_step_counts_the_same():
    """Batches of other lengths, one step of SGD's worth: as of one batch of all of them."""
    model, teacher, record = pruned()
    parts = [{"input_ids": TEXT[:1, :2]}, {"input_ids": TEXT[1:3]}]
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6, [1] * 6])
    whole = [{"input_ids": TEXT[:3], "attention_mask": mask}]
    norms = [
        recover(
            copy.deepcopy(model),
            teacher,
            given,
            record,
            Recovery(steps=1, batches_per_step=len(given), held_out=0),
        )[1].rows[0]
        for given in (parts, whole)
    ]
    assert norms[0].loss == pytest.approx(norms[1].loss, rel=1e-5)
    assert norms[0].gradient == pytest.approx(norms[1].gradient, rel=1e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("train", ["kept", LowRank(2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path, train, dtype):
    options = Recovery(steps=6, learning_rate=3e-3)
    whole, teacher, record = pruned(dtype)
    recover(whole, teacher, batches(), record, options, train=train)
    more = {"train": train, "checkpoint": tmp_path / "run.pt", "save_every": 2}

    killed, teacher, record = pruned(dtype)
    calls = []

    def stop(*_):
        calls.append(0)
        if len(calls) > 10:
            raise Stop

    hook = teacher.register_forward_hook(stop)
    with pytest.raises(Stop):
        recover(killed, teacher, batches(), record, options, **more)
    hook.remove()
    assert [n for n, _ in killed.named_parameters()] == [n for n, _ in whole.named_parameters()]

    again, teacher, record = pruned(dtype)
    _, report = recover(again, teacher, batches(), record, options, **more)
    assert len(report.rows) == 6
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(DistillationError, match="learning_rate was 0.003, now it is 0.001"):
        recover(again, teacher, batches(), record, Recovery(steps=6, learning_rate=1e-3), **more)
    with pytest.raises(DistillationError, match="batches was"):
        recover(again, teacher, batches()[::-1], record, options, **more)


def test_bad_input_is_told():
    model, teacher, record = pruned()
    with pytest.raises(DistillationError, match="pass the record that squash returned"):
        recover(model, teacher, batches())
    with pytest.raises(DistillationError, match="no floating parameter 'nope'"):
        recover(model, teacher, batches(), record, train=["nope"])
    with pytest.raises(fxs.FxSparsityError, match="at least 2, found 1; held_out=0"):
        recover(model, teacher, batches()[:1], record)
    spoilt = copy.deepcopy(teacher)
    spoilt.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(DistillationError, match="step 1: the loss is nan"):
        recover(model, spoilt, batches(), record)
    never = fxs.WeightNormSparsifier()
    whole = fxs.prepare(copy.deepcopy(teacher), never, None, "unstructured 50%")
    with pytest.raises(DistillationError, match=r"masks keep everything; call sparsifier.step\(\)"):
        recover(whole, teacher, batches())
    masked, teacher, _ = pruned(squash=False)
    with pytest.raises(fxs.FxSparsityError, match="low-rank adapters go on plain weights"):
        recover(masked, teacher, batches(), train=LowRank())
    for bad in ({"steps": 0}, {"learning_rate": 0}, {"held_out": 1}, {"autocast": torch.float16}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Recovery(**bad)


def test_gradients_of_zeros_are_not_clipped_with_the_others():
    torch.manual_seed(0)
    model, sparsifier = nn.Linear(8, 8), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, None, "unstructured 50%")
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    held = fxs.hold(torch.optim.SGD(model.parameters(), lr=0.1), model, record)
    held.mask_gradients()  # there are none yet
    model(torch.randn(4, 8)).square().sum().backward()
    before = model.weight.grad.clone()
    held.mask_gradients()
    assert torch.equal(model.weight.grad, torch.where(record["weight"].keep, before, 0))
    assert bool(before[~record["weight"].keep].any())
