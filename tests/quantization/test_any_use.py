"""Weights that torchao's own tensors cannot stand for: 8-bit codes that any operator reads."""

import copy
import logging

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig

import fx_sparsity as fxs
from fx_sparsity.quantization import BackendError, get_backend, sparsify_and_quantize
from fx_sparsity.quantization.any_use import Int8AnyUseConfig, Int8AnyUseTensor, int8_any_use
from fx_sparsity.quantization.torchao_tensors import is_torchao

ORDERS = ("sparsify_first", "quantize_first")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")


def language_model(name):
    """A small one at its default configuration, and its input."""
    torch.manual_seed(0)
    t = transformers
    if name == "mixtral":
        model = t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=4))
    elif name == "qwen3_moe":
        own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        model = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SIZES, **own, head_dim=16))
    elif name == "gpt_oss":
        own = {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = t.GptOssForCausalLM(t.GptOssConfig(**SIZES, **own, head_dim=16))
    else:
        own = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 16}
        ids = {"bos_token_id": None, "eos_token_id": None}
        model = t.GPT2LMHeadModel(t.GPT2Config(**own, **ids))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval(), {"input_ids": torch.randint(64, (2, 8))}


def flow(model, inputs, order, **kwargs):
    kwargs.setdefault("mapping", "unstructured 50%")
    return sparsify_and_quantize(
        model, fxs.WeightNormSparsifier(), inputs, order=order, backend="torchao", **kwargs
    )


def by_hand(weight, reduced):
    """Codes and scales in float64: the largest magnitude along some axes is 127."""
    values = weight.detach().double().numpy()
    scale = abs(values).max(axis=reduced, keepdims=True) / 127
    return torch.from_numpy((values / scale).round() * scale)


def dequantized(model):
    """A copy with float weights in the place of this tensor's."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, Int8AnyUseTensor):
                module._parameters[name] = nn.Parameter(parameter.dequantize())
    return plain


USES = {
    "a selected expert": ((3, 8, 16), (2,), lambda w: F.linear(torch.ones(2, 16), w[1])),
    "experts by a tensor": ((3, 8, 16), (2,), lambda w: w[torch.tensor([2, 0, 2])]),
    "an expert by a tensor": ((3, 8, 16), (2,), lambda w: w[torch.tensor(2)]),
    "a slice": ((3, 8, 16), (2,), lambda w: w[:, 2:6]),
    "batched product": ((3, 16, 8), (1,), lambda w: torch.bmm(torch.ones(3, 2, 16), w)),
    "grouped product": (
        (3, 8, 16),
        (2,),
        lambda w: F.grouped_mm(
            torch.ones(4, 16), w.mT, offs=torch.tensor([1, 1, 4], dtype=torch.int32)
        ),
    ),
    "addmm": ((16, 8), (0,), lambda w: torch.addmm(torch.ones(8), torch.ones(2, 16), w)),
    "convolution": ((8, 4, 3, 3), (1, 2, 3), lambda w: F.conv2d(torch.ones(1, 4, 5, 5), w)),
    "lookup": ((40, 8), (1,), lambda w: F.embedding(torch.tensor([[3, 3], [0, 39]]), w)),
    "split": ((24, 16), (1,), lambda w: F.linear(torch.ones(2, 16), w.chunk(3)[1])),
    "normalized": ((8, 16), (1,), lambda w: torch._weight_norm(w, torch.ones(8, 1))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("use", USES)
def test_it_stands_for_its_values_in_every_use(use, dtype):
    shape, reduced, read = USES[use]
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    tensor = int8_any_use(weight, reduced)
    expected = by_hand(weight, reduced)
    torch.testing.assert_close(
        tensor.dequantize().double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6,
        atol=0,
    )  # fmt: skip
    if dtype == torch.float32:
        result = read(tensor)
        assert type(result) is torch.Tensor
        assert torch.equal(result, read(tensor.dequantize()))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_look_up_the_rows_that_they_are_asked_for(mode, monkeypatch):
    torch.manual_seed(0)
    table = torch.randn(50, 8)
    tensor = int8_any_use(table, (1,))
    values = by_hand(table, (1,))
    monkeypatch.setattr(Int8AnyUseTensor, "dequantize", None)
    baskets = torch.randint(50, (4, 3))
    for padding in (None, int(baskets[0, 0])):
        found = F.embedding_bag(baskets, tensor, mode=mode, padding_idx=padding)
        expected = F.embedding_bag(baskets, values, mode=mode, padding_idx=padding)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    flat, offsets = torch.randint(50, (9,)), torch.tensor([0, 0, 4, 9])
    weights = torch.rand(9) if mode == "sum" else None
    found, expected = (
        F.embedding_bag(
            flat,
            which,
            offsets,
            mode=mode,
            include_last_offset=True,
            per_sample_weights=None if weights is None else weights.to(which.dtype),
        )
        for which in (tensor, values)
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_writing_is_refused_and_casts_keep_codes():
    tensor = int8_any_use(torch.randn(4, 8), (1,))
    with pytest.raises(TypeError, match="mul_.* would write to a weight of 8-bit codes"):
        tensor.mul_(2)
    module = nn.Linear(8, 4)
    module.weight = nn.Parameter(tensor, requires_grad=False)
    module.to(torch.bfloat16)
    assert module.weight.dtype == module(torch.ones(1, 8).bfloat16()).dtype == torch.bfloat16
    assert module.weight.scale.dtype == torch.float32
    assert torch.equal(module.weight.qdata, tensor.qdata)
    with pytest.raises(ValueError, match="NaN or infinite"):
        int8_any_use(torch.tensor([[1.0, torch.inf]]), (1,))
    assert int8_any_use(torch.zeros(2, 2), (1,)).dequantize().eq(0).all()


def test_a_hub_model_of_codes_is_not_saved_for_what_cannot_load_it(tmp_path):
    quantized, _ = flow(*language_model("gpt2"), "sparsify_first")
    with pytest.raises(
        BackendError, match=r"GPT2LMHeadModel has codes of torchao.*fx_sparsity.save"
    ):
        copy.deepcopy(quantized).save_pretrained(tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    fxs.save(quantized, tmp_path / "codes.safetensors")
    lowered, _ = fxs.lower(quantized, policy="always")
    with pytest.raises(fxs.FxSparsityError, match="GPT2LMHeadModel is lowered"):
        lowered.save_pretrained(tmp_path / "hub")
    with pytest.raises(BackendError, match="GPT2LMHeadModel has codes of torchao"):
        fxs.unlower(lowered).save_pretrained(tmp_path / "hub")
    quantized = fxs.unlower(lowered)
    for module in quantized.modules():
        for attribute, tensor in list(module._parameters.items()):
            if is_torchao(tensor):
                setattr(module, attribute, nn.Parameter(tensor.dequantize()))
    quantized.save_pretrained(tmp_path / "floats")
    assert (tmp_path / "floats" / "model.safetensors").exists()


def test_codes_are_shared_between_processes():
    module = nn.Linear(8, 4)
    module.weight = nn.Parameter(int8_any_use(torch.randn(4, 8), (1,)), requires_grad=False)
    codes = module.weight.qdata.clone()
    assert not module.weight.is_shared()
    module.share_memory()
    assert module.weight.is_shared()
    assert module.weight.qdata.is_shared()
    assert module.weight.scale.is_shared()
    assert torch.equal(module.weight.qdata, codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "gpt2"])
def test_language_models_are_quantized_whole(name, order, tmp_path):
    model, inputs = language_model(name)
    expected = model(**inputs).logits
    quantized, verification = flow(model, inputs, order)
    assert all(row.quantized for row in verification.raise_if_lost())
    for row in verification:
        # Independent of the reader: what the tensor itself makes of its codes.
        values = quantized.get_parameter(row.where).dequantize()
        assert row.zeros == values.eq(0).sum() >= row.wanted == row.elements // 2
    if name != "gpt2":
        held = [quantized.get_parameter(fqn) for fqn in EXPERTS]
        bytes_held = sum(w.qdata.nbytes + w.scale.nbytes for w in held)
        assert bytes_held < 0.3 * sum(model.get_parameter(fqn).nbytes for fqn in EXPERTS)
    logits = quantized(**inputs).logits
    # Activations are rounded to 8 bits in between, which magnifies a difference in the last bit.
    torch.testing.assert_close(dequantized(quantized)(**inputs).logits, logits, rtol=0, atol=0.02)
    alone = get_backend("torchao").quantize(model, inputs, fxs.find_weights(model, inputs)).model
    assert (alone(**inputs).logits - expected).norm() < 0.1 * expected.norm()

    assert torch.equal(copy.deepcopy(quantized)(**inputs).logits, logits)
    fxs.save(quantized, tmp_path / "model.fxs")
    fxs.load(tmp_path / "model.fxs", alone)
    assert torch.equal(alone(**inputs).logits, logits)
    filled, _ = language_model(name)
    filled.load_state_dict(quantized.state_dict(), assign=True)
    assert torch.equal(filled(**inputs).logits, logits)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_it_is_exported_and_compiled_whole(name):
    model, inputs = language_model(name)
    quantized, _ = flow(model, inputs, "quantize_first", config={nn.Module: Int8AnyUseConfig()})
    logits = quantized(**inputs).logits
    inputs = {**inputs, "use_cache": False}
    program = torch.export.export(quantized, (), inputs, strict=False)
    torch.testing.assert_close(program.module()(**inputs).logits, logits)
    with torch.no_grad():
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, logits)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Mixed(nn.Module):
    """A bag tied to a functional linear, a convolution beneath a norm, and a bag that writes."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 16, mode="mean")
        self.conv = parametrizations.weight_norm(nn.Conv1d(1, 4, 9, padding=4))
        self.doubled = Doubled(16, 8)
        self.normed = nn.EmbeddingBag(40, 8, max_norm=1.0)
        self.head = nn.Parameter(torch.randn(3, 8))

    def forward(self, baskets):
        x = self.bag(baskets)
        x = self.conv(x[:, None]).sum(1) + F.linear(x, self.bag.weight[:16])
        return F.linear(self.doubled(x) + self.normed(baskets), self.head)


@pytest.mark.parametrize("order", [*ORDERS, "qat"])
def test_what_else_there_is_in_a_model(order, caplog):
    torch.manual_seed(0)
    model, inputs = Mixed().eval(), (torch.randint(40, (5, 3)),)
    config = {nn.Module: Int8AnyUseConfig()}
    if order != "qat":
        config[nn.Linear] = Int8WeightOnlyConfig(set_inductor_config=False)
    quantized, verification = flow(
        model, inputs, order, config=config, calibrate=lambda m: m(*inputs)
    )
    rows = {row.fqn: row for row in verification.raise_if_lost()}
    left = {fqn: row.in_float for fqn, row in rows.items() if not row.quantized}
    assert list(left) == ["normed.weight"]
    assert "max_norm" in left["normed.weight"]
    assert "1 of 5 masked weights stay in float (its lookups renormalize it" in caplog.text
    norm = quantized.get_parameter("conv.parametrizations.weight.original1")
    assert isinstance(norm, Int8AnyUseTensor)
    told = "doubled.weight: torchao quantizes what F.linear computes there, though Doubled has"
    assert (told in caplog.text) == (order != "qat")
    assert (type(quantized.doubled.weight) is Int8Tensor) == (order != "qat")
    if order == "sparsify_first":
        torch.testing.assert_close(quantized(*inputs), dequantized(quantized)(*inputs))


def test_ties_hold():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(40, 16), nn.Linear(16, 40)
            self.head.weight = self.bag.weight

        def forward(self, baskets):
            return self.head(self.bag(baskets))

    model, inputs = Tied().eval(), (torch.randint(40, (5, 3)),)
    quantized, verification = flow(
        model, inputs, "sparsify_first", config={nn.Module: Int8AnyUseConfig()}
    )
    assert verification.raise_if_lost()
    assert quantized.head.weight is quantized.bag.weight


def test_what_codes_cannot_take_is_refused_and_not_lost():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))

        def forward(self, x):
            return x @ self.first @ self.second

    x = torch.randn(2, 8)
    quantized, _ = flow(Product(), (x,), "sparsify_first", config={"first": Int8AnyUseConfig()})
    with pytest.raises(TypeError, match="item of a weight of 8-bit codes cannot be set"):
        quantized.first.data[0] = 0
    quantized.second.data[0] = quantized.first[0]
    quantized.second.data[1:] = quantized.first.data[1:]
    assert torch.equal(quantized.second, quantized.first.dequantize())
    sparsifier = fxs.WeightNormSparsifier()
    with pytest.raises(fxs.FxSparsityError, match=r"^first is codes, held by Int8AnyUseTensor"):
        fxs.prepare(quantized, sparsifier, (x,), {"module_name": {"first": "2:4"}})
    fxs.prepare(quantized, sparsifier, (x,), "2:4")
    assert sparsifier.names == ["second"]


def test_axes_that_nothing_tells_are_asked_for(caplog):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(8, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return self.linear(x) * self.scale

    caplog.set_level(logging.WARNING)
    model, inputs = Scaled().eval(), (torch.randn(3, 8),)
    with pytest.raises(BackendError, match=r"scale: no operator is known to read it as a weight"):
        flow(model, inputs, "sparsify_first", config={"scale": Int8AnyUseConfig()})
    with pytest.raises(BackendError, match=r"^scale: Dimension out of range .*; mend it, or"):
        flow(model, inputs, "sparsify_first", config={"scale": Int8AnyUseConfig((2,))})
    quantized, _ = flow(model, inputs, "sparsify_first", config={"scale": Int8AnyUseConfig((1,))})
    assert isinstance(quantized.scale, Int8AnyUseTensor)
    with torch.no_grad():
        model.linear.weight[0, 0] = torch.nan
    with pytest.raises(BackendError, match=r"linear.weight: expected finite values"):
        flow(model, inputs, "quantize_first", config={nn.Module: Int8AnyUseConfig()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_and_tables_of_codes_are_lowered_and_restored(dtype):
    class Shop(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.table = nn.EmbeddingBag(40, 16, mode="sum"), nn.Embedding(40, 16)
            self.product = transformers.pytorch_utils.Conv1D(64, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, baskets):
            x = self.product(self.bag(baskets) + self.table(baskets[:, 0]))
            return x, self.attention(x[None, :, :16], x[None, :, 16:32], x[None, :, 32:48])[0]

    torch.manual_seed(0)
    model, inputs = Shop().eval().to(dtype), (torch.randint(40, (5, 3)),)
    nn.init.normal_(model.product.weight)
    mapping = {
        "global": "unstructured 75%",
        "module_name": {"bag": "rows 50%", "table": "rows 50%"},
    }
    quantized, verification = flow(
        model, inputs, "sparsify_first", mapping=fxs.SparsityMapping.from_dict(mapping)
    )
    record = verification.raise_if_lost().record
    expected = [dequantized(quantized)(*inputs), quantized(*inputs)]
    codes = quantized.product.weight.qdata.clone()
    lowered, _ = fxs.lower(quantized, inputs, "always")
    assert type(lowered.bag).__name__ == "RowPrunedEmbeddingBag"
    assert type(lowered.table).__name__ == "RowPrunedEmbedding"
    assert type(lowered.product).__name__ == "LoweredLinear"
    assert type(lowered.attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    near = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for other in expected:
        torch.testing.assert_close(lowered(*inputs), other, **near)
    assert fxs.verify(lowered, record).ok
    restored = fxs.unlower(lowered)
    assert isinstance(restored.product.weight, Int8AnyUseTensor)
    assert torch.equal(restored.product.weight.qdata, codes)
    torch.testing.assert_close(restored(*inputs), expected[1], **near)
