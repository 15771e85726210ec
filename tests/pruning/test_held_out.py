"""Batches that are held out: judged by the inputs that hooks see, in float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fx_sparsity as fxs
from fx_sparsity.graph import InputError
from fx_sparsity.pruning import Reconstruction
from fx_sparsity.pruning.held_out import damped
from fx_sparsity.pruning.methods import (
    CalibratedSparsifier,
    ExactUpdate,
    MagnitudeSparsifier,
    Pipeline,
    Statistics,
)


class Model(nn.Module):
    """A table, linears and a convolution; without a graph where the input's values decide."""

    def __init__(self, traced: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 12)
        self.first = nn.Linear(12, 24)
        self.conv = nn.Conv1d(24, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)
        self.traced = traced

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.table(tokens)).relu()
        if not self.traced and float(x.sum()) < -1:
            return x
        return self.last(self.conv(x.mT).mT)


def batches(count: int = 8) -> list[Tensor]:
    return [torch.randint(20, (3, 10)) for _ in range(count)]


HELD = {1, 3, 5, 7}  # of eight, when half are held out


def inputs_of(model: nn.Module, data: list[Tensor]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {"first": [], "conv": [], "last": []}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, _o, name=name: seen[name].append(args[0].double())
        )
        for name in seen
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return seen


METHODS = [MagnitudeSparsifier, fxs.WandaSparsifier, fxs.SparseGPTSparsifier]


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_error_on_held_out_batches_is_told(
    method: type[CalibratedSparsifier], traced: bool
) -> None:
    torch.manual_seed(0)
    dense, data = Model(traced).eval(), batches()
    pruned, report = fxs.prune(
        copy.deepcopy(dense), method(), data, "unstructured 50%", held_out=0.5, progress=False
    )
    unused = [batch for place, batch in enumerate(data) if place in HELD]
    # Inputs are those that the walk had, where each weight sees what the pruned ones give out.
    seen = inputs_of(pruned if report.sequential else dense, unused)
    for name, found in seen.items():
        before, after = dense.get_submodule(name), pruned.get_submodule(name)
        missed = whole = 0.0
        for x in found:
            images = []
            for module in (before, after):
                weight = module.weight.detach().double()
                if isinstance(module, nn.Conv1d):
                    images.append(nn.functional.conv1d(x, weight, padding=1))
                else:
                    images.append(x @ weight.mT)
            missed += float((images[1] - images[0]).square().sum())
            whole += float(images[0].square().sum())
        row = report[f"{name}.weight"]
        assert row.held_out == pytest.approx((missed / whole) ** 0.5, rel=1e-3)
        assert row.tokens == 4 * 30
    counts = torch.stack(unused).flatten().bincount(minlength=20).double()
    before, after = (m.table.weight.detach().double() for m in (dense, pruned))
    missed = ((after - before).square().sum(1) * counts).sum()
    whole = (before.square().sum(1) * counts).sum()
    assert report["table.weight"].held_out == pytest.approx(float((missed / whole) ** 0.5), 1e-3)
    assert f"{report['table.weight'].held_out:.4g}" in str(report)


def test_statistics_are_those_of_the_other_batches() -> None:
    torch.manual_seed(0)
    dense, data = Model(True).eval(), batches()
    some, _ = fxs.prune(
        copy.deepcopy(dense), fxs.WandaSparsifier(), data, "2:4", held_out=0.5, progress=False
    )
    used = [batch for place, batch in enumerate(data) if place not in HELD]
    wanted, _ = fxs.prune(copy.deepcopy(dense), fxs.WandaSparsifier(), used, "2:4", progress=False)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(tensor, some.state_dict()[name])


def test_nothing_is_held_out_unless_asked_for() -> None:
    _, report = fxs.prune(Model(True), fxs.WandaSparsifier(), batches(4), "2:4", progress=False)
    assert {row.held_out for row in report.rows} == {None}
    assert "held out" not in str(report)


def test_an_update_that_overfits_is_damped() -> None:
    """24 tokens for 32 columns: least squares fits them better than those that are not seen."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 16, bias=False))
    mixing = torch.randn(16, 32)
    data = [torch.randn(12, 16) @ mixing + torch.randn(12, 32) for _ in range(4)]
    errors = {}
    for name, method in {
        "mask alone": MagnitudeSparsifier(),
        "update": Pipeline(MagnitudeSparsifier(), ExactUpdate(damping=1e-6)),
    }.items():
        model = copy.deepcopy(dense)
        _, report = fxs.prune(model, method, data, "unstructured 50%", held_out=0.5, progress=False)
        row = report["0.weight"]
        errors[name] = row.held_out
        kept = model[0].weight
        assert int((kept == 0).sum()) == kept.numel() // 2
    assert row.error is not None
    assert errors["update"] < errors["mask alone"]
    assert any("overfits" in note for note in row.notes)
    plain = copy.deepcopy(dense)
    used = [data[0], data[2]]
    method = Pipeline(MagnitudeSparsifier(), ExactUpdate(damping=1e-6))
    fxs.prune(plain, method, used, "unstructured 50%", progress=False)
    x = torch.cat([data[1], data[3]])
    missed = (x @ (plain[0].weight - dense[0].weight).mT).norm() / (x @ dense[0].weight.mT).norm()
    assert errors["update"] < float(missed)


@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 8), st.integers(0, 12), st.integers(0, 99)
)
def test_damping_is_the_best_on_the_line(
    groups: int, out: int, size: int, tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, tokens, size, generator=generator)
    dense = torch.randn(groups, out, size, generator=generator)
    mask = torch.rand(groups, out, size, generator=generator) < 0.5
    kept = torch.where(mask, dense + torch.randn(groups, out, size, generator=generator), 0.0)
    stats = Statistics(torch.full((groups,), tokens), gram=x.mT @ x)
    found, share = damped(dense, mask, kept, stats)

    def error(weight: Tensor) -> Tensor:
        return ((weight - dense).double() @ x.double().mT).square().sum((1, 2))

    best = error(found)
    assert bool((found[~mask] == 0).all())
    for t in torch.linspace(0, 1, 11).tolist():
        other = torch.where(mask, dense + t * (kept - dense), 0.0)
        # Whatever is nearly the whole of an update is left as it is.
        assert bool((best <= 1.05 * error(other) + 1e-3).all()) or bool((share >= 0.9).any())
    assert bool(((share >= 0) & (share <= 1)).all())


def test_rebuilt_blocks_are_judged_by_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [torch.randn(5, 8) for _ in range(8)]
    _, report = fxs.prune(
        model,
        fxs.WandaSparsifier(),
        data,
        "2:4",
        held_out=0.25,
        reconstruction=Reconstruction(steps=4, held_out=0.5),
        progress=False,
    )
    assert {block.held_out for block in report.blocks} == {2}


@pytest.mark.parametrize(
    ("count", "share", "error", "text"),
    [
        (1, 0.5, InputError, "at least 2 batches"),
        (4, 1.0, ValueError, r"a share in \[0, 1\), found 1.0"),
        (4, -0.1, ValueError, r"a share in \[0, 1\), found -0.1"),
    ],
)
def test_what_cannot_be_held_out(
    count: int, share: float, error: type[Exception], text: str
) -> None:
    model = Model(True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        fxs.prune(
            model, fxs.WandaSparsifier(), batches(count), "2:4", held_out=share, progress=False
        )
    assert before.keys() == model.state_dict().keys()
