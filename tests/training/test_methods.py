"""Every algorithm against its update in the paper, written down plainly in float64, step by step."""

import itertools
import math

import pytest
import torch

import fx_sparsity as fxs
from fx_sparsity.patterns import PatternError
from fx_sparsity.training import (
    ELSA,
    SEFT,
    SET,
    GradualMagnitude,
    Movement,
    RigL,
    SoftMovement,
    StraightThrough,
    TopKAST,
    TransposableStraightThrough,
)
from tests.training.toys import (
    COLUMNS,
    ROWS,
    Toy,
    assert_same,
    lowest,
    prepared,
    train,
    two_four,
)

LR, SIZE, STEPS = 0.3, ROWS * COLUMNS, 12
PRUNED = 96  # 75%


def sgd(model):
    return torch.optim.SGD(model.parameters(), LR)


def run(method, config="unstructured 75%", schedule=None):
    toy, model = prepared(method, config)
    made = None if schedule is None else schedule(method)
    return train(toy, model, method, sgd(model), STEPS, made)


def test_gradual_magnitude_learns_then_freezes():
    seen = run(
        GradualMagnitude(every=2, end=8),
        schedule=lambda method: fxs.CubicSL(method, delta_t=1, total_t=3),
    )
    toy, weight = Toy(), Toy().start.clone()
    keep, wanted = torch.ones(ROWS, COLUMNS, dtype=torch.bool), []
    for step in range(STEPS + 1):
        if step % 2 == 0 and step < 8:
            level = 0.75 - 0.75 * (1 - step / 2 / 3) ** 3
            keep = ~lowest(weight.abs(), round(level * SIZE))
        wanted.append((weight.clone(), keep))
        weight -= LR * toy.gradient(weight * keep) * keep
    assert_same(seen, wanted)
    assert int((~keep).sum()) == PRUNED


def test_movement_keeps_the_highest_scores():
    seen = run(Movement(every=3, end=10))
    toy, weight, scores = Toy(), Toy().start.clone(), torch.zeros(ROWS, COLUMNS).double()
    keep, wanted = ~lowest(weight.abs(), PRUNED), []
    for step in range(STEPS + 1):
        if step % 3 == 0 and 0 < step < 10:
            keep = ~lowest(scores, PRUNED)
        wanted.append((weight.clone(), keep))
        gradient = toy.gradient(weight * keep)
        if step < 10:
            scores -= gradient * weight
        weight -= LR * gradient * keep
    assert_same(seen, wanted)


def test_soft_movement_keeps_what_is_above_its_threshold():
    method = SoftMovement(every=2, threshold=0.45, penalty=0.02, score_lr=3.0)
    toy, model = prepared(method)
    seen = train(toy, model, method, sgd(model), STEPS)
    weight, scores, wanted = toy.start.clone(), torch.zeros(ROWS, COLUMNS).double(), []
    for step in range(STEPS + 1):
        if step % 2 == 0:
            keep = scores.sigmoid() > 0.45
        wanted.append((weight.clone(), keep))
        gradient = toy.gradient(weight * keep)
        scores -= 3.0 * (gradient * weight + 0.02 * scores.sigmoid() * (1 - scores.sigmoid()))
        weight -= LR * gradient * keep
    assert_same(seen, wanted)
    share = float((~keep).double().mean())
    assert 0 < share < 1
    _, record = fxs.squash(model, method)
    assert record["0.weight"].level == pytest.approx(share)


def drop_and_grow(weight, keep, fraction, importance, promise):
    share = 0.75 + fraction * 0.25
    stay = keep & ~lowest(importance.where(keep, -1), round(share * SIZE))
    grown = lowest(-promise, 32 - int(stay.sum()), among=~stay)
    weight.masked_fill_(grown & ~keep, 0)
    return stay | grown


@pytest.mark.parametrize("kind", [RigL, SEFT])
def test_rigl_and_seft(kind):
    seen = run(kind(every=2, end=9, fraction=0.4))
    toy, weight = Toy(), Toy().start.clone()
    keep = ~lowest(weight.abs(), PRUNED)
    wanted, moved = [(weight.clone(), keep)], 0
    for step in range(1, STEPS + 1):
        gradient = toy.gradient(weight * keep)
        weight -= LR * gradient * keep
        if step % 2 == 0 and step < 9:
            fraction = 0.4 / 2 * (1 + math.cos(step * math.pi / 9))
            importance = weight.abs() * (gradient.abs() if kind is SEFT else 1)
            before = keep
            keep = drop_and_grow(weight, keep, fraction, importance, gradient.abs())
            moved += int((keep != before).sum())
        wanted.append((weight.clone(), keep))
    assert moved
    assert_same(seen, wanted)


def test_set_drops_the_smallest_and_grows_at_random():
    seen = run(SET(every=4, fraction=0.25))
    again = run(SET(every=4, fraction=0.25))
    other = run(SET(every=4, fraction=0.25, seed=1))
    assert_same(seen, again)
    assert not torch.equal(seen[4][1], other[4][1])
    grown_at = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    for step in range(4, STEPS + 1, 4):
        (weight, new), (_, old) = seen[step], seen[step - 1]
        assert int(new.sum()) == 32
        stay = old & ~lowest(other[0][0].new_tensor(0) + weight.abs().where(old, -1), PRUNED + 8)
        assert bool((new & stay == stay).all())
        assert int((new & ~stay).sum()) == 8
        assert bool((weight[new & ~old] == 0).all())
        grown_at |= new & ~old
    assert int(grown_at.sum()) > 10


def test_top_kast_uses_a_and_trains_b():
    seen = run(TopKAST(every=2, end=7, explores=0.5, penalty=0.01))
    toy, weight, wanted = Toy(), Toy().start.clone(), []
    for step in range(STEPS + 1):
        if step % 2 == 0 and step < 7:
            used = ~lowest(weight.abs(), PRUNED)
            learns = ~lowest(weight.abs(), PRUNED // 2)
        wanted.append((weight.clone(), used))
        gradient = toy.gradient(weight * used)
        if step < 7:
            shrink = weight * used + weight * (learns & ~used) / 0.25
            weight -= LR * (gradient * learns + 0.01 * shrink)
        else:
            weight -= LR * gradient * used
    assert_same(seen, wanted)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_sr_ste_and_the_plain_estimator(decay):
    seen = run(StraightThrough(end=9, decay=decay), "2:4")
    toy, weight, wanted = Toy(), Toy().start.clone(), []
    for step in range(STEPS + 1):
        if step < 9:
            keep = two_four(weight.abs())
        wanted.append((weight.clone(), keep))
        gradient = toy.gradient(weight * keep)
        weight -= LR * (gradient + decay * weight * ~keep if step < 9 else gradient * keep)
    assert_same(seen, wanted)


def test_transposable_masks_are_the_best_that_are_2_4_both_ways():
    method = TransposableStraightThrough(every=1, end=5, decay=0.05)
    toy, model = prepared(method, "2:4")
    for weight, keep in train(toy, model, method, sgd(model), STEPS)[:5]:
        for row, column in itertools.product(range(0, ROWS, 4), range(0, COLUMNS, 4)):
            block = slice(row, row + 4), slice(column, column + 4)
            kept = keep[block]
            assert kept.sum(0).tolist() == kept.sum(1).tolist() == [2] * 4
            scores = weight[block].abs().tolist()
            best = 0.0
            for pairs in itertools.product(itertools.combinations(range(4), 2), repeat=4):
                if all(sum(i in pair for pair in pairs) == 2 for i in range(4)):
                    kinds = zip(scores, pairs, strict=True)
                    best = max(best, sum(line[i] for line, pair in kinds for i in pair))
            assert float((weight[block].abs() * kept).sum()) == pytest.approx(best)
    with pytest.raises(PatternError, match="0.weight: expected pattern 2:4 and two dimensions"):
        prepared(TransposableStraightThrough(), "1:4")


def test_elsa_trains_dense_until_z_and_x_agree():
    seen = run(ELSA(end=9, every=3, penalty=0.5))
    toy, x, dual = Toy(), Toy().start.clone(), torch.zeros(ROWS, COLUMNS).double()
    keep, wanted = torch.ones(ROWS, COLUMNS, dtype=torch.bool), []
    for step in range(STEPS + 1):
        penalty = 0.5 * (1 - math.cos(math.pi * step / 9)) / 2
        if step % 3 == 0 and step < 9:
            drawn = x + dual / penalty if step else x
            z = drawn * ~lowest(drawn.abs(), PRUNED)
            dual = dual + penalty * (x - z)
        if step == 9:
            keep = ~lowest(x.abs(), PRUNED)
        wanted.append((x.clone(), keep))
        gradient = toy.gradient(x * keep)
        x -= LR * (gradient + penalty * (x - z) + dual if step < 9 else gradient * keep)
    assert_same(seen, wanted)


def test_elsa_weighs_by_the_second_moment_of_an_adam():
    method = ELSA(end=4, every=2)
    toy, model = prepared(method)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    weight, keep = train(toy, model, method, optimizer, 4)[-1]
    moment = optimizer.state[next(model.parameters())]["exp_avg_sq"]
    assert torch.equal(keep, ~lowest(moment * weight**2, PRUNED))
    assert not torch.equal(keep, ~lowest(weight.abs(), PRUNED))
