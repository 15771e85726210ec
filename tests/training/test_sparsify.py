"""What holds for every method: counts, resuming, optimizers and their state, compiled models, bad input."""

import copy
import io
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torchao.optim import AdamW8bit

import fx_sparsity as fxs
from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.patterns import PatternError
from fx_sparsity.sparsifier import MaskError
from fx_sparsity.training import (
    ELSA,
    SEFT,
    SET,
    GradualMagnitude,
    Movement,
    RigL,
    SoftMovement,
    Sparsify,
    StraightThrough,
    TopKAST,
)
from fx_sparsity.training.scalars import MaskScalars
from tests.training.toys import Toy, original, prepared, train

METHODS = {
    "gradual": lambda: GradualMagnitude(every=2),
    "movement": lambda: Movement(every=2),
    "soft": lambda: SoftMovement(every=2, threshold=0.45, penalty=0.02, score_lr=3.0),
    "set": lambda: SET(every=2),
    "rigl": lambda: RigL(every=2, end=100),
    "seft": lambda: SEFT(every=2, end=100),
    "kast": lambda: TopKAST(every=2),
    "ste": lambda: StraightThrough(decay=0.01),
    "elsa": lambda: ELSA(end=6, every=2),
}
PATTERNS = [
    ("unstructured", 0.6),
    ("unstructured:out", 0.5),
    ("2:4", 0.5),
    ("1:3 pad", 2 / 3),
    ("block:2x4", 0.5),
    ("storage-block:1x4:2", 0.75),
    ("rows", 0.25),
]


def masked(method, pattern="unstructured", level=0.75):
    toy = Toy()
    model = toy.model()
    config = {"tensor_fqn": "0.weight", "pattern": pattern, "sparsity_level": level}
    method.prepare(model, [config])
    return toy, model


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), 0.05, **options)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"soft"}))
def test_counts_are_exact_after_every_step_whatever_the_pattern(name):
    for pattern, level in PATTERNS:
        method = METHODS[name]()
        toy, model = masked(method, pattern, level)
        seen = train(toy, model, method, adamw(model), 8)
        wanted = compute_mask(toy.start, *method.asks("0.weight"), Rank.SQUARE)
        for _, mask in seen[6 if name == "elsa" else 0 :]:
            assert int(mask.sum()) == int(wanted.sum()), pattern
        assert not model[0].weight[~method.keep("0.weight")].any()
        trained, record = fxs.squash(model, method)
        assert fxs.verify(trained, record).ok
        assert str(record["0.weight"].pattern) == pattern


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_run_resumes_bit_for_bit_in_the_middle_of_its_schedule(name):
    def fresh():
        method = METHODS[name]()
        toy, model = masked(method)
        optimizer = adamw(model)
        schedule = fxs.CubicSL(method, delta_t=1, total_t=3) if method.scheduled else None
        return toy, model, method, optimizer, Sparsify(model, method, optimizer, schedule)

    toy, model, method, optimizer, run = fresh()
    train(toy, model, method, optimizer, 5, run=run)
    file = io.BytesIO()
    parts = {"model": model, "optimizer": optimizer, "run": run}
    torch.save({key: part.state_dict() for key, part in parts.items()}, file)
    wanted = train(toy, model, method, optimizer, 5, run=run)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    toy, model, method, optimizer, run = fresh()
    for key, part in {"run": run, "optimizer": optimizer, "model": model}.items():
        part.load_state_dict(saved[key])
    for one, other in zip(train(toy, model, method, optimizer, 5, run=run), wanted, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.05, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05),
    "foreach": lambda p: torch.optim.AdamW(p, 0.05, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 0.05, fused=True),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_optimizers_state_of_what_grows_is_zero(name):
    method = SET(every=1, fraction=0.5)
    toy, model = masked(method)
    optimizer = OPTIMIZERS[name](model.parameters())
    seen = train(toy, model, method, optimizer, 8)
    grown, kept = seen[8][1] & ~seen[7][1], seen[8][1] & seen[7][1]
    assert int((grown & sum(mask for _, mask in seen[:7]).bool()).sum()) > 5
    tensors = [
        v for v in optimizer.state[original(model)].values() if torch.is_tensor(v) and v.ndim
    ]
    assert tensors
    for value in tensors:
        assert not value[grown].any()
        assert value[kept].all()
    assert not original(model)[grown].any()


def test_masked_gradients_are_computed_for_the_steps_that_need_them_alone():
    method = RigL(every=4)
    toy, model = masked(method)
    optimizer = adamw(model)
    Sparsify(model, method, optimizer)
    dense = []
    for _ in range(9):
        optimizer.zero_grad()
        toy.loss(model).backward()
        dense.append(bool(original(model).grad[~method.keep("0.weight")].any()))
        optimizer.step()
        assert not original(model).grad[~method.keep("0.weight")].any() or dense[-1]
    assert [step for step, was in enumerate(dense) if was] == [3, 7]


def test_accumulated_gradients_and_a_closure_give_what_one_batch_gives():
    def trained(way):
        method = SEFT(every=2, fraction=0.5)
        toy, model = masked(method)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        run = Sparsify(model, method, optimizer)
        parts = 2 if way == "accumulated" else 1

        def backward():
            for _ in range(parts):
                (toy.loss(model) / parts).backward()

        for _ in range(4):
            optimizer.zero_grad()
            if way != "closure":
                backward()
            if way == "early":
                run.after_backward()
            optimizer.step(*[backward] * (way == "closure"))
        assert method.trained == 4
        return original(model).detach(), method.keep("0.weight")

    plain = trained("plain")
    for way in ("accumulated", "closure", "early"):
        weight, mask = trained(way)
        torch.testing.assert_close(weight, plain[0])
        assert torch.equal(mask, plain[1])


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_changes_nothing_and_steps_that_it_skips_do_not_count(fused):
    def trained(factors, scaler):
        method = ELSA(end=20, every=1, penalty=0.5)
        toy, model = masked(method)
        model.float()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        Sparsify(model, method, optimizer)
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale(model(toy.x.float()).square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert method.trained == 3
        return original(model).detach()

    plain = trained([1.0] * 3, torch.amp.GradScaler("cpu", enabled=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    torch.testing.assert_close(trained([1.0, float("inf"), 1.0, 1.0], scaler), plain)


def test_compiled_models_are_compiled_once():
    compiles = []

    def backend(gm, inputs):
        compiles.append(gm)
        return gm

    method = RigL(every=2, end=50)
    toy, model = masked(method)
    plain_method = RigL(every=2, end=50)
    _, plain = masked(plain_method)
    seen = train(toy, plain, plain_method, adamw(plain), 6)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = adamw(model)
    Sparsify(compiled, method, optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        toy.loss(compiled).backward()
        optimizer.step()
    assert len(compiles) == 1
    torch.testing.assert_close(original(model), seen[-1][0])
    assert torch.equal(method.keep("0.weight"), seen[-1][1])


def test_a_copy_is_bound_to_the_copied_model_and_trains_alike():
    method = Movement(every=2)
    toy, model = masked(method)
    optimizer = adamw(model)
    train(toy, model, method, optimizer, 3)
    other, copied = copy.deepcopy((model, method))
    assert copied.model is other
    assert copied.optimizer is None
    assert copied.trained == 3
    assert torch.equal(copied.state["0.weight"]["scores"], method.state["0.weight"]["scores"])
    assert copied._target("0.weight").mask.through.all()


def test_what_is_refused_before_the_first_step():
    method = RigL(every=2, end=10)
    toy, model = masked(method)
    with pytest.raises(MaskError, match="SET has no masks on this Sequential; call prepare"):
        Sparsify(model, SET(), adamw(model))
    with pytest.raises(MaskError, match="RigL has no masks on this Sequential"):
        Sparsify(toy.model(), method, adamw(model))
    with pytest.raises(MaskError, match="0.weight: the optimizer does not train the parameter"):
        Sparsify(model, method, adamw(toy.model()))
    with pytest.raises(
        ValueError, match="RigL moves masks until step 10, and training ends at .* 8"
    ):
        Sparsify(model, method, adamw(model), steps=8)
    schedule = fxs.CubicSL(method, delta_t=1, total_t=8)
    with pytest.raises(ValueError, match="0.weight is at level .* at the last of 5 updates"):
        Sparsify(model, method, adamw(model), schedule)
    with pytest.raises(ValueError, match="another sparsifier"):
        Sparsify(model, method, adamw(model), fxs.CubicSL(copy.deepcopy(method)))
    original(model).requires_grad_(False)
    with pytest.raises(MaskError, match="0.weight is frozen"):
        Sparsify(model, method, torch.optim.AdamW([torch.zeros(2, requires_grad=True)]))
    assert method.get_mask("0.weight").all()
    assert method.trained == 0


def test_what_else_is_refused():
    soft = METHODS["soft"]()
    with pytest.raises(PatternError, match="0.weight: pattern 2:4 counts its zeros"):
        masked(soft, "2:4")
    _, model = masked(soft)
    with pytest.raises(ValueError, match="SoftMovement makes its own levels"):
        Sparsify(model, soft, adamw(model), fxs.CubicSL(soft))
    for method in (RigL(), ELSA(end=5)):
        table = nn.Sequential(nn.Embedding(8, 4, sparse=True))
        method.prepare(table, [{"tensor_fqn": "0.weight"}])
        with pytest.raises(MaskError, match="0.weight: .* needs the gradients of all elements"):
            Sparsify(table, method, torch.optim.SparseAdam(table.parameters()))
    for kind in (GradualMagnitude, RigL):
        with pytest.raises(ValueError, match="found every=0, begin=0, end=None"):
            kind(every=0)
    elsa = ELSA(end=5)
    _, model = masked(elsa)
    with pytest.raises(MaskError, match="ELSA computes masks at step 5, and 0 are trained"):
        fxs.squash(model, elsa)


def test_a_plain_mask_is_no_place_for_a_method_that_needs_gradients():
    plain = fxs.WeightNormSparsifier()
    _, model = prepared(plain)
    with pytest.raises(MaskError, match="0.weight: its mask lets no gradients through as RigL"):
        RigL().prepare(model, [{"tensor_fqn": "0.weight"}])
    GradualMagnitude().prepare(model, [{"tensor_fqn": "0.weight"}])


def test_parameters_that_are_swapped_are_told_at_the_next_step():
    method = RigL(every=2)
    toy, model = masked(method)
    optimizer = adamw(model)
    Sparsify(model, method, optimizer)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    toy.loss(model).backward()
    with pytest.raises(MaskError, match=re.escape("0.weight: the optimizer does not train")):
        optimizer.step()


def test_weight_decay_beneath_masks_that_may_come_back_is_logged(caplog):
    method = GradualMagnitude()
    _, model = masked(method)
    with caplog.at_level("INFO", "fx_sparsity"):
        Sparsify(model, method, adamw(model))
    assert "weight_decay shrinks" in caplog.text
    assert "0.weight" in caplog.text


def test_a_run_that_is_removed_leaves_the_optimizer_alone():
    method = RigL(every=1)
    toy, model = masked(method)
    optimizer = adamw(model)
    run = Sparsify(model, method, optimizer)
    train(toy, model, method, optimizer, 2, run=run)
    run.remove()
    trained, _ = fxs.squash(model, method)
    toy.loss(trained).backward()
    optimizer.step()
    assert method.trained == 2


def test_gradients_of_single_samples_and_of_checkpoints_pass_through():
    method = StraightThrough()
    toy, model = masked(method, "2:4", 0.5)
    parameters = dict(model.named_parameters())
    name = "0.parametrizations.weight.original"

    def loss(weight, x, y):
        out = torch.func.functional_call(model, {name: weight}, (x,))
        return (out - y).square().sum() / (2 * toy.y.numel())

    weight = parameters[name].detach()
    single = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, toy.x, toy.y)
    wanted = toy.gradient(weight * method.keep("0.weight"))
    Sparsify(model, method, adamw(model))
    for checkpointed in (False, True):
        model.zero_grad()
        out = checkpoint(model, toy.x, use_reentrant=False) if checkpointed else model(toy.x)
        ((out - toy.y).square().mean() / 2).backward()
        wanted = toy.gradient(weight * method.keep("0.weight"))
        torch.testing.assert_close(parameters[name].grad, wanted)
    again = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, toy.x, toy.y)
    torch.testing.assert_close(again.sum(0), wanted)
    assert not torch.equal(single.sum(0), again.sum(0))


def test_a_closure_that_looks_at_the_gradients_itself_is_followed_once():
    def trained(early):
        method = RigL(every=1, fraction=0.5)
        toy, model = masked(method)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        run = Sparsify(model, method, optimizer)

        def backward():
            optimizer.zero_grad()
            toy.loss(model).backward()
            if early:
                run.after_backward()

        for _ in range(4):
            optimizer.step(backward)
        return method.keep("0.weight")

    assert torch.equal(trained(early=True), trained(early=False))


@pytest.mark.parametrize("kind", ["movement", "soft"])
def test_infinite_gradients_of_a_step_that_a_scaler_skips_teach_nothing(kind):
    def trained(factors):
        method = METHODS[kind]()
        toy, model = masked(method)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = Sparsify(model, method, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale(toy.loss(model) * factor).backward()
            scaler.unscale_(optimizer)
            run.after_backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        return method.state["0.weight"]["scores"], method.keep("0.weight")

    for one, other in zip(trained([1.0, float("inf"), 1.0]), trained([1.0, 1.0]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "kind", [torch.optim.Adafactor, pytest.param(AdamW8bit, marks=pytest.mark.exhaustive)]
)
def test_an_optimizer_whose_state_cannot_be_reset_is_told_at_the_first_step(kind):
    method, model = RigL(every=100), nn.Sequential(nn.Linear(256, 32))
    method.prepare(model, [{"tensor_fqn": "0.weight", "sparsity_level": 0.5}])
    optimizer = kind(model.parameters(), 0.1)
    Sparsify(model, method, optimizer)
    model(torch.randn(2, 256)).sum().backward()
    words = f"0.weight: {kind.__name__} does not keep its state an element"
    with pytest.raises(MaskError, match=words):
        optimizer.step()


def test_an_optimizer_that_remembers_all_weights_in_one_is_refused():
    method = SET()
    _, model = masked(method)
    with pytest.raises(MaskError, match="0.weight: LBFGS does not keep its state an element"):
        Sparsify(model, method, torch.optim.LBFGS(model.parameters()))


def test_what_grows_after_the_last_step_is_refused():
    method = RigL(every=5)
    _, model = masked(method)
    with pytest.raises(ValueError, match="RigL would grow weights after step 20, the last"):
        Sparsify(model, method, adamw(model), steps=20)
    Sparsify(model, method, adamw(model), steps=19)


def test_the_state_of_another_method_is_refused():
    one, other = RigL(), SET()
    masked(one)
    masked(other)
    other.trained = 3
    with pytest.raises(MaskError, match="the state is that of a RigL, and this is a SET"):
        other.load_state_dict(one.state_dict())
    assert other.trained == 3


def test_a_state_that_does_not_fit_changes_nothing():
    method = GradualMagnitude()
    _, model = masked(method)
    run = Sparsify(model, method, adamw(model), fxs.CubicSL(method, delta_t=1, total_t=8))
    state = copy.deepcopy(run.state_dict())
    state["method"]["trained"], state["schedule"]["unknown"] = 7, 0
    with pytest.raises(ValueError, match="CubicSL has no unknown"):
        run.load_state_dict(state)
    del state["schedule"]["unknown"], state["method"]["groups"][:]
    state["schedule"]["last_epoch"] = 5
    with pytest.raises(MaskError, match="the state has no group"):
        run.load_state_dict(state)
    assert (method.trained, run.schedule.last_epoch) == (0, 1)


def test_numbers_of_masks_that_are_squashed_are_read():
    method = RigL()
    _, model = masked(method)
    method.step()
    scalars = MaskScalars(method)
    before = scalars.read()
    fxs.squash(model, method)
    assert scalars.read() == before


def test_a_method_takes_part_in_one_run_at_a_time():
    def trained(runs):
        method = ELSA(end=20, every=1)
        toy, model = masked(method)
        optimizer = adamw(model)
        for _ in range(runs):
            run = Sparsify(model, method, optimizer)
        train(toy, model, method, optimizer, 3, run=run)
        assert method.trained == 3
        return original(model).detach()

    assert torch.equal(trained(1), trained(2))


@pytest.mark.parametrize("name", ["rigl", "seft", "set"])
def test_a_weight_that_nothing_depends_on_keeps_what_it_has(name):
    method = METHODS[name]()
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    names = ("used.weight", "idle.weight")
    method.prepare(model, [{"tensor_fqn": n, "sparsity_level": 0.5} for n in names])
    optimizer = adamw(model)
    Sparsify(model, method, optimizer)
    before = {name: model[name].weight.detach().clone() for name in ("used", "idle")}
    for _ in range(4):
        optimizer.zero_grad()
        model["used"](torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model["idle"].weight, before["idle"])
    assert not torch.equal(model["used"].weight != 0, before["used"] != 0)


def test_sharded_parameters_are_refused():
    method = RigL()
    _, model = masked(method)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            MaskError, match="0.weight: is sharded, a DTensor; masks are those of whole"
        ):
            Sparsify(model, method, adamw(model))
    finally:
        dist.destroy_process_group()
