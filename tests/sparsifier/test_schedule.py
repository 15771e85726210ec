import warnings

import pytest
import torch

from fx_sparsity import (
    BaseDataScheduler,
    BaseScheduler,
    CubicSL,
    DataNormSparsifier,
    LambdaSL,
    WeightNormSparsifier,
)
from tests.models import make


def sparsifiers():
    model, _ = make("sequential")
    bound = WeightNormSparsifier(sparsity_level=0.8)
    bound.prepare(model)
    data = DataNormSparsifier(
        [("a", torch.randn(4, 4)), ("b", torch.randn(4, 4))], sparsity_level=0.8
    )
    return [bound, data]


def levels(sparsifier):
    return [sparsifier.config_of(name)["sparsity_level"] for name in sparsifier.names]


@pytest.mark.parametrize("kind", [0, 1])
def test_lambda_schedules_work_on_either_kind_of_sparsifier(kind):
    sparsifier = sparsifiers()[kind]
    scheduler = LambdaSL(sparsifier, [lambda epoch: epoch / 4, lambda epoch: 1.0])
    assert levels(sparsifier) == [0, 0.8]
    sparsifier.step()
    scheduler.step()
    assert levels(sparsifier) == scheduler.get_last_sl() == [0.2, 0.8]
    sparsifier.step()
    assert sparsifier.get_mask(sparsifier.names[0]).float().mean() == pytest.approx(0.8, abs=0.06)


def test_cubic_follows_the_papers_formula():
    sparsifier = sparsifiers()[0]
    scheduler = CubicSL(sparsifier, init_sl=0.1, init_t=2, delta_t=2, total_t=4)
    seen = [levels(sparsifier)[0]]
    for _ in range(12):
        sparsifier.step()
        scheduler.step()
        seen.append(levels(sparsifier)[0])
    for epoch, level in enumerate(seen):
        t = min(max(epoch, 2), 10)
        assert level == pytest.approx(0.8 + (0.1 - 0.8) * (1 - (t - 2) / 8) ** 3)


def test_the_wrong_order_warns_and_the_right_one_does_not():
    sparsifier = sparsifiers()[0]
    scheduler = LambdaSL(sparsifier, lambda epoch: 1.0)
    with pytest.warns(UserWarning, match=r"before `sparsifier.step\(\)`"):
        scheduler.step()
    scheduler = LambdaSL(sparsifier, lambda epoch: 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.step()
        scheduler.step()


def test_state_comes_back():
    sparsifier = sparsifiers()[0]
    scheduler = LambdaSL(sparsifier, lambda epoch: epoch / 10)
    sparsifier.step()
    scheduler.step()
    resumed = LambdaSL(sparsifier, lambda epoch: epoch / 10)
    resumed.load_state_dict(scheduler.state_dict())
    sparsifier.step()
    resumed.step()
    assert resumed.last_epoch == 2
    assert levels(sparsifier) == pytest.approx([0.16, 0.16])
    for name in sparsifier.names:
        sparsifier.config_of(name)["sparsity_level"] = 0.0
    resumed.load_state_dict(scheduler.state_dict())
    assert levels(sparsifier) == pytest.approx([0.08, 0.08])
    with pytest.raises(ValueError, match="LambdaSL has no typo"):
        resumed.load_state_dict({"typo": 1})


def test_lists_must_fit_and_sparsifiers_must_be_sparsifiers():
    sparsifier = sparsifiers()[0]
    with pytest.raises(ValueError, match="length 2, found 1"):
        LambdaSL(sparsifier, [lambda epoch: 1.0])
    with pytest.raises(ValueError, match="length 2, found 3"):
        CubicSL(sparsifier, init_sl=[0, 0, 0])
    with pytest.raises(TypeError):
        BaseScheduler(sparsifier)

    class Constant(BaseScheduler):
        def get_sl(self):
            return [0.5] * len(self.sparsifier.names)

    with pytest.raises(TypeError, match="expected a sparsifier, found int"):
        Constant(3)
    Constant(sparsifier)
    assert levels(sparsifier) == [0.5, 0.5]


@pytest.mark.parametrize("kind", [0, 1])
def test_any_value_of_a_configuration_can_be_scheduled_by_name(kind):
    sparsifier = sparsifiers()[kind]
    for name in sparsifier.names:
        sparsifier.config_of(name)["zeros_per_block"] = 4

    class FewerZeros(BaseDataScheduler):
        def get_schedule_param(self):
            return {name: max(4 - self.last_epoch, 1) for name in self.base_param}

    scheduler = FewerZeros(sparsifier, "zeros_per_block")
    assert set(scheduler.base_param.values()) == {4}
    for _ in range(2):
        sparsifier.step()
        scheduler.step()
    assert set(scheduler.get_last_param().values()) == {2}
    assert {sparsifier.config_of(n)["zeros_per_block"] for n in sparsifier.names} == {2}


def test_what_cannot_be_scheduled_is_refused():
    model, _ = make("sequential")
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight", "pattern": "2:4"}])
    with pytest.raises(ValueError, match=r"0.weight: pattern 2:4 fixes its level"):
        LambdaSL(sparsifier, lambda epoch: 1.0)
    data = sparsifiers()[1]
    scheduler = LambdaSL(data, lambda epoch: 1.0)
    data.step()
    data.add_data("c", torch.ones(2, 2))
    with pytest.raises(ValueError, match="has 2 levels, the sparsifier 3 tensors"):
        scheduler.step()
