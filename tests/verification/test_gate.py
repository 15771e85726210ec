import json

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.ao import quantization as tq

import fx_sparsity as fxs
from fx_sparsity.quantization import get_backend, sparsify_and_quantize
from fx_sparsity.quantization.torch_ao.embeddings import embedding_qconfig
from fx_sparsity.verification import SparsityLostError, read_weights
from tests.models import make

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")


def sparse(name="recommender", pattern="2:4"):
    """(squashed model, inputs, record)."""
    model, inputs = make(name)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global(pattern))
    sparsifier.step()
    return (*fxs.squash(model, sparsifier)[:1], inputs, fxs.SparsityRecord.of(sparsifier))


def faults(verification):
    return {row.fqn: row.faults for row in verification if row.faults}


def quantized_alone(backend, inputs, **kwargs):
    model, _ = make("recommender")
    weights = fxs.find_weights(model, inputs)
    return get_backend(backend).quantize(model, inputs, weights, **kwargs).model


def test_a_float_model_passes():
    model, _, record = sparse()
    assert fxs.verify(model, record).raise_if_lost().ok


def test_one_masked_value_flipped_in_float():
    model, _, record = sparse()
    row, column = (~record["top.0.weight"].keep).nonzero()[0]
    with torch.no_grad():
        model.top[0].weight[row, column] = 1e-30
    verification = fxs.verify(model, record)
    lost = {"top.0.weight": ("1 of 192 zeros lost", "pattern 2:4 broken")}
    assert faults(verification) == lost
    with pytest.raises(SparsityLostError, match=r"^top.0.weight: 1 of 192 zeros lost"):
        verification.raise_if_lost()


def test_one_zero_more_than_asked_for_in_float():
    model, _, record = sparse()
    row, column = record["top.0.weight"].keep.nonzero()[0]
    with torch.no_grad():
        model.top[0].weight[row, column] = 0
    assert faults(fxs.verify(model, record)) == {"top.0.weight": ("1 zeros more than asked for",)}


@pytest.mark.parametrize("backend", ["eager", "pt2e"])
def test_one_code_flipped_and_one_zero_too_many_after_quantizing(backend):
    model, inputs, record = sparse()
    weights = fxs.find_weights(model, inputs)
    quantized = get_backend(backend).quantize(model, inputs, weights).model
    reference = quantized_alone(backend, inputs)
    assert fxs.verify(quantized, record, reference=reference).ok
    stored = {w.fqn: w for w in read_weights(quantized)}

    table = stored["tables.1.weight"]
    codes, (row, column) = table.data.clone(), (~record[table.fqn].keep).nonzero()[3]
    codes[row, column] += 1 if codes[row, column] < 255 else -1
    table.write(codes)

    linear = stored["top.0.weight"]
    codes, keep = linear.data.clone(), record[linear.fqn].keep
    row, column = (keep & (codes != 0)).nonzero()[0]
    codes[row, column] = 0
    linear.write(codes)

    assert faults(fxs.verify(quantized, record, reference=reference)) == {
        "tables.1.weight": ("1 of 160 zeros lost", "pattern 2:4 broken"),
        "top.0.weight": ("1 zeros more than asked for",),
    }


def test_a_fractional_zero_point_loses_zeros_and_is_named():
    model, inputs, record = sparse(pattern="unstructured 50%")
    config = {nn.EmbeddingBag: tq.float_qparams_weight_only_qconfig}
    weights = fxs.find_weights(model, inputs)
    quantized = get_backend("eager").quantize(model, inputs, weights, config=config).model
    verification = fxs.verify(quantized, record)
    assert set(faults(verification)) == {f"tables.{i}.weight" for i in range(3)}
    with pytest.raises(SparsityLostError, match=r"tables.2.weight: \d+ of 160 zeros lost"):
        verification.raise_if_lost()


def test_torchaos_own_embedding_quantizer_is_caught():
    from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(40, 8)

        def forward(self, index):
            return self.table(index)

    torch.manual_seed(0)
    inputs = (torch.randint(40, (4,)),)
    mapping = fxs.SparsityMapping().set_global("2:4")
    for config, lost in ((EmbeddingQuantizer(), True), (None, False)):
        _, verification = sparsify_and_quantize(
            Table(),
            fxs.WeightNormSparsifier(),
            inputs,
            order="sparsify_first",
            backend="pt2e",
            mapping=mapping,
            config=config,
        )
        assert bool(faults(verification)) == lost


def test_a_weight_left_in_float_though_meant_to_be_quantized():
    model, inputs, record = sparse()
    weights = fxs.find_weights(model, inputs)
    config = {nn.EmbeddingBag: embedding_qconfig}
    quantized = get_backend("eager").quantize(model, inputs, weights, config=config).model
    meant = get_backend("eager").quantize(model, inputs, weights).meant
    assert set(faults(fxs.verify(quantized, record, meant=meant))) == {
        name for name in weights if "tables" not in name
    }
    assert fxs.verify(quantized, record).ok


def test_a_weight_that_is_gone():
    model, _, record = sparse("sequential")
    model[2] = nn.Identity()
    verification = fxs.verify(model, record)
    assert faults(verification) == {"2.weight": ("not found in the model",)}
    assert "2.weight" in str(verification)


def test_the_table_and_the_json():
    model, inputs, record = sparse("sequential")
    quantized = get_backend("eager").quantize(model, inputs, fxs.find_weights(model, inputs)).model
    verification = fxs.verify(quantized, record)
    assert_expected_inline(
        str(verification),
        """\
weight    stored as                                               sparsity  pattern  masked  zero in code space  extra zeros  max change  verdict
--------  ------------------------------------------------------  --------  -------  ------  ------------------  -----------  ----------  -------
0.weight  qint8, per-channel affine (integer zero point), axis 0  50.0%     2:4          64  64 (100.0%)                   -           -  ok
2.weight  qint8, per-channel affine (integer zero point), axis 0  50.0%     2:4          64  64 (100.0%)                   -           -  ok""",
    )
    assert json.loads(json.dumps(verification.to_dict()))["rows"][0]["zero_in_code"] == 64
    assert len(verification) == 2
    assert verification[0].fqn == "0.weight"


def test_a_scale_that_is_not_finite():
    model, inputs = make("sequential")
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    _, verification = sparsify_and_quantize(
        model,
        fxs.WeightNormSparsifier(),
        inputs,
        order="sparsify_first",
        backend="torchao",
        mapping=fxs.SparsityMapping().set_global("2:4"),
    )
    fault = "4 zero codes do not dequantize to zero: scales are not finite"
    assert faults(verification) == {"0.weight": (fault, "4 kept values are NaN or infinite")}


def test_compiled_exported_and_stale_models():
    model, inputs, record = sparse("sequential")
    assert fxs.verify(torch.compile(model, backend="eager"), record).raise_if_lost().ok
    assert fxs.verify(torch.export.export(model, inputs), record).raise_if_lost().ok
    model[2] = nn.Linear(4, 8)
    (lost,) = faults(fxs.verify(model, record)).items()
    assert lost[0] == "2.weight"
    assert lost[1][0] == "stored in shape (8, 4), expected (8, 16)"


def test_a_sequence_of_ones_own_is_no_fused_module():
    class Block(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(16, 16, bias=False))
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            return nn.functional.linear(super().forward(x), self.weight)

    torch.manual_seed(0)
    model, inputs = nn.Sequential(Block()), (torch.randn(2, 16),)
    mapping = fxs.SparsityMapping().set_global("2:4").set_module_name("0.0", None)
    for order in ("sparsify_first", "quantize_first"):
        quantized, verification = sparsify_and_quantize(
            model,
            fxs.WeightNormSparsifier(),
            inputs,
            order=order,
            backend="torchao",
            mapping=mapping,
            config={nn.Linear: None},
        )
        assert [row.fqn for row in verification.raise_if_lost()] == ["0.weight"]
        assert quantized[0][0].weight.ne(0).all()
