"""Blocks that are rebuilt: judged by running the dense and the pruned model side by side."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fx_sparsity as fxs
from fx_sparsity.pruning import CalibrationError, Reconstruction
from fx_sparsity.pruning.methods import MagnitudeSparsifier
from fx_sparsity.pruning.reconstruction import relative_loss


class Layer(nn.Module):
    """A residual block with a norm, and an activation that writes in place."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Model(nn.Module):
    """Layers between a stem and a head."""

    def __init__(self, size: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(size, size)
        self.layers = nn.ModuleList(Layer(size) for _ in range(layers))
        self.head = nn.Linear(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def batches(count: int = 16, size: int = 16) -> list[Tensor]:
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    return [torch.randn(2, 24, size) @ mixing for _ in range(count)]


def outputs(model: Model, data: list[Tensor]) -> list[list[Tensor]]:
    """Of each batch what each layer gives out, by hooks on the running model."""
    found: list[list[Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, out: found[-1].append(out))
        for layer in model.layers
    ]
    with torch.no_grad():
        for batch in data:
            found.append([])
            model(batch)
    for handle in handles:
        handle.remove()
    return found


def errors(dense: Model, pruned: Model, data: list[Tensor]) -> list[float]:
    """Relative error of each layer's outputs, mean over tokens, float64."""
    total = torch.zeros(len(dense.layers), dtype=torch.float64)
    for wanted, found in zip(outputs(dense, data), outputs(pruned, data), strict=True):
        for place, (a, b) in enumerate(zip(wanted, found, strict=True)):
            a, b = a.double(), b.double()
            total[place] += ((a - b).square().sum(-1) / a.square().sum(-1)).mean()
    return (total / len(data)).tolist()


@pytest.mark.parametrize("targets", ["dense", "pruned"])
def test_blocks_come_closer_to_the_dense_ones(targets):
    torch.manual_seed(0)
    model, data = Model().eval(), batches()
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    mapping = fxs.SparsityMapping().set_global("unstructured 60%").set_module_name("head", None)
    fxs.prune(plain, MagnitudeSparsifier(), data, mapping, progress=False)
    options = Reconstruction(steps=150, learning_rate=3e-3, targets=targets)
    _, report = fxs.prune(
        model, MagnitudeSparsifier(), data, mapping, reconstruction=options, progress=False
    )
    assert [block.path for block in report.blocks] == [f"layers.{i}" for i in range(3)]
    fresh = batches(4)
    for before, after in zip(errors(dense, plain, fresh), errors(dense, model, fresh), strict=True):
        assert after < (0.8 if targets == "dense" else 1) * before
    if targets == "dense":  # what the report says of unused batches is what hooks see
        seen = errors(dense, model, [data[4], data[12]])  # spread over sixteen
        for block, error in zip(report.blocks, seen, strict=True):
            assert block.held_out == 2
            assert block.after == pytest.approx(error, rel=1e-4)
    for row in report.rows:
        weight = model.get_submodule(row.fqn.rpartition(".")[0]).weight
        assert int((weight == 0).sum()) == round(0.6 * weight.numel())
    for name, parameter in dense.named_parameters():
        if name.startswith("head"):
            assert torch.equal(parameter, model.get_parameter(name))
    assert not torch.equal(dense.layers[0].norm.weight, model.layers[0].norm.weight)


class Interrupts(MagnitudeSparsifier):
    """Stops in the middle of the second block."""

    count = 0

    def solve(self, *args, **kwargs):
        self.count += 1
        if self.count == 5:
            raise KeyboardInterrupt
        return super().solve(*args, **kwargs)


def test_an_interruption_in_a_block_leaves_it_untouched():
    torch.manual_seed(0)
    model, data = Model().eval(), batches(6)
    dense, whole = copy.deepcopy(model), copy.deepcopy(model)
    options = Reconstruction(steps=20, targets="pruned")
    sparsifier = Interrupts()
    with pytest.raises(KeyboardInterrupt) as caught:
        fxs.prune(model, sparsifier, data, "2:4", reconstruction=options, progress=False)
    assert "3 of 8 weights are pruned, the last of them layers.0.down.weight" in "".join(
        caught.value.__notes__
    )
    for name, value in dense.state_dict().items():
        if name.startswith(("layers.1", "layers.2", "head")):
            assert torch.equal(value, model.state_dict()[name])
    fxs.prune(model, sparsifier, data, "2:4", reconstruction=options, progress=False)
    at_once = MagnitudeSparsifier()
    fxs.prune(whole, at_once, data, "2:4", reconstruction=options, progress=False)
    fxs.squash(model, sparsifier)
    fxs.squash(whole, at_once)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def test_without_a_graph_it_is_refused():
    class Branches(Model):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    model = Branches().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="along a graph"):
        fxs.prune(
            model,
            MagnitudeSparsifier(),
            batches(2),
            "2:4",
            reconstruction=Reconstruction(),
            progress=False,
        )
    with pytest.raises(CalibrationError, match="sequential=False"):
        fxs.prune(
            Model().eval(),
            MagnitudeSparsifier(),
            batches(2),
            "2:4",
            sequential=False,
            reconstruction=Reconstruction(),
            progress=False,
        )
    with torch.inference_mode(), pytest.raises(CalibrationError, match="inference_mode"):
        fxs.prune(
            Model().eval(),
            MagnitudeSparsifier(),
            batches(2),
            "2:4",
            reconstruction=Reconstruction(),
            progress=False,
        )
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_linear_block_comes_to_its_least_squares():
    """A model without blocks is one; of a single linear layer the best values are known."""
    torch.manual_seed(0)
    model, data = nn.Linear(16, 8), batches(8)
    dense = copy.deepcopy(model)
    options = Reconstruction(steps=1500, learning_rate=3e-2, held_out=0)
    _, report = fxs.prune(
        model, MagnitudeSparsifier(), data, "2:4", reconstruction=options, progress=False
    )
    (block,) = report.blocks
    assert (block.path, block.held_out) == ("", 0)
    x = torch.cat([batch.reshape(-1, 16) for batch in data]).double()
    wanted = dense(x.float()).detach().double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    share = 1 / wanted.norm(dim=1, keepdim=True)
    keep = torch.cat([model.weight != 0, torch.ones(8, 1, dtype=torch.bool)], 1)
    least = torch.zeros(())
    for row in range(8):
        columns = (x * share)[:, keep[row]]
        right = (wanted * share)[:, row : row + 1]
        solved = torch.linalg.lstsq(columns, right).solution
        least = least + (columns @ solved - right).square().mean()
    assert block.after == pytest.approx(float(least), rel=0.03)
    assert block.after < block.before / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_program_and_its_dtype(dtype):
    torch.manual_seed(0)
    model, data = Model().eval().to(dtype), [batch.to(dtype) for batch in batches(6)]
    program = torch.export.export(model, (data[0],))
    before = {name: value.clone() for name, value in program.state_dict.items()}
    options = Reconstruction(steps=30)
    pruned, report = fxs.prune(
        program,
        MagnitudeSparsifier(),
        [(batch,) for batch in data],
        "2:4",
        reconstruction=options,
        progress=False,
    )
    assert [block.path for block in report.blocks] == [f"layers.{i}" for i in range(3)]
    assert all(block.after < block.before for block in report.blocks)
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict.items())
    assert all(p.dtype == dtype for p in pruned.parameters())
    assert torch.isfinite(pruned.module()(data[0])).all()


def test_data_that_say_nothing_of_others_are_not_fitted():
    """With one token to a batch, and few of them, what is rebuilt is worse elsewhere."""
    torch.manual_seed(0)
    model = Model(size=64, layers=2).eval()
    data = [torch.randn(1, 1, 64) for _ in range(5)]
    options = Reconstruction(steps=300, learning_rate=1e-2)
    _, report = fxs.prune(
        model, MagnitudeSparsifier(), data, "2:4", reconstruction=options, progress=False
    )
    refused = [block for block in report.blocks if block.note]
    assert refused
    for block in report.blocks:
        assert block.after <= block.before
    assert "not rebuilt" in str(report)


def test_padding_is_nothing_to_come_close_to():
    wanted, found = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    keep = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    loss = relative_loss(found, wanted, keep)
    found[~keep] = 1e6
    assert torch.equal(loss, relative_loss(found, wanted, keep))
    by_hand = (found - wanted)[keep].square().sum(1) / wanted[keep].square().sum(1)
    torch.testing.assert_close(loss, by_hand.mean())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"targets": "sparse"}, "targets"),
        ({"held_out": 1.0}, "held_out"),
    ],
)
def test_options_that_say_nothing(options, match):
    with pytest.raises(ValueError, match=match):
        Reconstruction(**options)


def test_padding_of_a_decoder_is_its_own():
    """What stands where an encoder's mask leaves tokens out counts, if the decoder's keeps it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=32
    )
    model = transformers.T5Model(config).eval()
    ones, padded = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    padded[:, 2:] = 0
    data = [
        {
            "input_ids": torch.randint(32, (2, 6)),
            "attention_mask": padded,
            "decoder_input_ids": torch.randint(32, (2, 6)),
            "decoder_attention_mask": ones,
        }
        for _ in range(4)
    ]
    dense = copy.deepcopy(model)
    mapping = fxs.SparsityMapping().set_object_type("linear", "2:4")
    options = Reconstruction(steps=8, held_out=0)
    _, report = fxs.prune(
        model, MagnitudeSparsifier(), data, mapping, reconstruction=options, progress=False
    )
    found: dict[str, list[Tensor]] = {"dense": [], "pruned": []}
    for name, each in (("dense", dense), ("pruned", model)):
        hook = each.decoder.block[1].register_forward_hook(
            lambda _m, _a, out, name=name: found[name].append(out[0].detach())
        )
        with torch.no_grad():
            for batch in data:
                each(**batch)
        hook.remove()
    losses = [relative_loss(b, a, None) for a, b in zip(*found.values(), strict=True)]
    assert report.blocks[-1].path == "decoder.block.1"
    assert report.blocks[-1].after == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3)
