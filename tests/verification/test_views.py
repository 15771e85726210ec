"""Weights that a graph consumes transposed, in parts, more than once, or not as they are stored."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fx_sparsity as fxs
from fx_sparsity.quantization import BackendError, get_backend, sparsify_and_quantize
from fx_sparsity.quantization.pt2e import default_quantizer
from fx_sparsity.verification import SparsityLostError, read_weights
from tests.models import make

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")
ORDERS = ("sparsify_first", "quantize_first")


class Transposed(nn.Module):
    def __init__(self, rows=8, columns=16):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))

    def forward(self, x):
        return F.linear(x, self.weight.t())


class Packed(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.randn(sum(sizes), 8))

    def forward(self, x):
        return torch.cat([F.linear(x, part) for part in self.weight.split(self.sizes)], 1)


def run(model, inputs, order, backend="pt2e", **kwargs):
    return sparsify_and_quantize(
        model.eval(),
        fxs.WeightNormSparsifier(),
        inputs,
        order=order,
        backend=backend,
        mapping=fxs.SparsityMapping().set_global("2:4"),
        **kwargs,
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "model",
    [Transposed(), Transposed(8, 8), Packed([8, 8, 8]), Packed([16, 8, 8])],
    ids=["transposed", "square", "even", "uneven"],
)
def test_masks_follow_the_view_to_where_the_codes_are(model, order):
    quantized, verification = run(model, (torch.randn(2, 8),), order)
    verification.raise_if_lost()
    assert sum(row.wanted for row in verification) == model.weight.numel() / 2
    # Independent of the view: every code matrix is [out, in], as F.linear reads it.
    for stored in read_weights(quantized):
        assert stored.zeros().reshape(-1, 4).sum(1).ge(2).all()


def test_one_lost_zero_in_one_part_is_found():
    model, inputs = Packed([16, 8, 8]).eval(), (torch.randn(2, 8),)
    weights = fxs.find_weights(model, inputs)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    quantized = get_backend("pt2e").quantize(model, inputs, weights).model
    assert fxs.verify(quantized, record).ok
    part = read_weights(quantized)[1]
    codes = part.data.clone()
    codes[tuple((~part.seen(record["weight"].keep)).nonzero()[0])] = 5
    part.write(codes)
    faults = [row.faults for row in fxs.verify(quantized, record)]
    assert faults == [
        ("pattern 2:4 broken",),
        ("1 of 32 zeros lost", "pattern 2:4 broken"),
        ("pattern 2:4 broken",),
    ]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", ["eager", "pt2e"])
def test_every_alias_of_a_tied_weight_is_sparse(order, backend):
    model, inputs = make("tied")
    quantized, verification = run(model, inputs, order, backend)
    verification.raise_if_lost()
    assert [row.fqn for row in verification].count("embed.weight") == 2
    for stored in read_weights(quantized):
        if stored.quantized:
            assert stored.zeros().reshape(-1, 4).sum(1).ge(2).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_shared_module_is_quantized_and_masked_under_each_of_its_names(order):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a
            self.c = nn.Sequential(self.a)

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    quantized, verification = run(Shared(), (torch.randn(2, 8),), order, "eager")
    verification.raise_if_lost()
    assert quantized.a is quantized.b is quantized.c[0]
    assert all(row.quantized for row in verification)


def test_untying_after_squashing_is_noticed():
    model, inputs = make("tied")
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    assert fxs.verify(model, record).ok
    model.head.weight = nn.Parameter(torch.randn(32, 8))
    with pytest.raises(SparsityLostError, match=r"embed.weight: 128 of 128 zeros lost"):
        fxs.verify(model, record).raise_if_lost()


def test_what_stands_between_codes_and_consumer_is_a_fault():
    model, inputs = make("sequential")
    quantized, verification = run(model, inputs, "sparsify_first")
    assert verification.ok
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    record = fxs.SparsityRecord.of(sparsifier)
    (node,) = [n for n in quantized.graph.nodes if n.name == "linear"]
    with quantized.graph.inserting_before(node):
        filled = quantized.graph.call_function(torch.ops.aten.add.Tensor, (node.args[1], 1))
    node.update_arg(1, filled)
    quantized.recompile()
    (bad,) = [row for row in fxs.verify(quantized, record) if row.faults]
    assert bad.faults[0] == "read through add"


def test_swapped_zeros_do_not_cancel_out():
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight[:, 0] = 0
    sparsifier = fxs.WeightNormSparsifier()
    sparsifier.prepare(
        model, [{"tensor_fqn": "weight", "pattern": "unstructured", "sparsity_level": 0.0}]
    )
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    with torch.no_grad():
        model.weight[:, 0] = 1
        model.weight[:, 1] = 0
    (row,) = fxs.verify(model, record)
    assert row.faults == ("8 zeros more than asked for",)
    with torch.no_grad():
        model.weight.fill_(1)
    assert fxs.verify(model, record).ok


def test_a_static_quantizer_and_one_that_leaves_embeddings_out():
    model, inputs = make("recommender")
    _, verification = run(model, inputs, "sparsify_first", config=default_quantizer(dynamic=False))
    verification.raise_if_lost()
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    linears = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    _, verification = run(model, inputs, "sparsify_first", config=linears)
    rows = {row.fqn: row for row in verification.raise_if_lost()}
    assert rows["top.0.weight"].quantized
    assert not rows["tables.0.weight"].quantized


def test_what_the_eager_backend_cannot_run_is_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)

        def forward(self, index):
            return F.linear(self.embed(index), self.embed.weight)

    index = (torch.randint(10, (3,)),)
    with pytest.raises(BackendError, match="does not run on example_inputs: TypeError"):
        run(Functional(), index, "quantize_first", "eager")
    model, inputs = make("sequential")
    weights = fxs.find_weights(model, inputs)
    fxs.prepare(model, fxs.WeightNormSparsifier(), inputs)
    with pytest.raises(
        BackendError, match="0.weight, 2.weight still masked; squash before quantizing"
    ):
        get_backend("eager").quantize(model, inputs, weights)


class Copied(nn.Module):
    """The weight passes through a reshape that has to copy."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return F.linear(x, self.weight.permute(1, 0, 2).reshape(16, 8))


@pytest.mark.parametrize("order", ORDERS)
def test_masks_follow_through_copies(order):
    model = Copied()
    mapping = fxs.SparsityMapping().set_global("unstructured 50%")
    quantized, verification = sparsify_and_quantize(
        model.eval(),
        fxs.WeightNormSparsifier(),
        (torch.randn(2, 8),),
        order=order,
        backend="pt2e",
        mapping=mapping,
    )
    (row,) = verification.raise_if_lost()
    assert row.wanted == 64
    (stored,) = read_weights(quantized)
    dense = model.weight.detach().permute(1, 0, 2).reshape(16, 8)
    kept = ~stored.zeros()
    assert (stored.dequantize() - dense)[kept].abs().max() < 0.05
    assert dense[~kept].abs().max() <= dense[kept].abs().min() + 0.05
