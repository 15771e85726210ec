"""ONNX files that torch writes hold every zero; a runtime of its own gives what torch gives."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.quantization import sparsify_and_quantize
from fx_sparsity.quantization.pt2e import default_quantizer
from fx_sparsity.verification import read_weights
from fx_sparsity.verification.onnx_file import OnnxError

INPUTS = (torch.arange(28).remainder(11).view(4, 7),)
MAPPING = fxs.SparsityMapping().set_global("unstructured 50%").set_module_name("first", "2:4")


class Tagger(nn.Module):
    """A table tied to the head, a layer that is quantized and one that is not."""

    def __init__(self):
        super().__init__()
        self.table, self.first = nn.Embedding(50, 32), nn.Linear(32, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        hidden = torch.relu(self.first(self.table(tokens)))
        return self.head(self.conv(hidden.transpose(1, 2)).transpose(1, 2))


@pytest.fixture(scope="module", params=["float", "sparsify_first", "quantize_first"])
def file(request, tmp_path_factory):
    """(path, record, what torch gives, kinds of the weights)."""
    torch.manual_seed(0)
    model, sparsifier = Tagger().eval(), fxs.WeightNormSparsifier()
    if request.param == "float":
        model = fxs.prepare(model, sparsifier, INPUTS, MAPPING)
        sparsifier.step()
        model, record = fxs.squash(model, sparsifier)
        dtypes = {"table.weight": ["float32"] * 2, "first.weight": ["float32"]}
    else:
        quantizer = default_quantizer(dynamic=False)
        model, verification = sparsify_and_quantize(
            *(model, sparsifier, INPUTS),
            order=request.param,
            backend="pt2e",
            mapping=MAPPING,
            config=quantizer,
        )
        record = verification.record
        dtypes = {"table.weight": ["uint8", "int8"], "first.weight": ["int8"]}
    path = tmp_path_factory.mktemp("onnx") / "tagger.onnx"
    torch.onnx.export(model, INPUTS, path, dynamo=True, verbose=False)
    return path, record, model(*INPUTS), dtypes | {"conv.weight": ["float32"]}


def test_every_zero_is_in_the_file(file):
    path, record, _, dtypes = file
    verification = fxs.verify(path, record).raise_if_lost()
    assert {row.share for row in verification.rows} == {1.0}
    found = {fqn: [] for fqn in record}
    for row in verification.rows:
        found[row.fqn].append(row.dtype)
    if dtypes["first.weight"] == ["float32"]:  # a tied weight may be one initializer
        assert set(found.pop("table.weight")) == {"float32"}
        dtypes = {k: v for k, v in dtypes.items() if k != "table.weight"}
    assert found == dtypes


def test_a_lost_zero_is_seen(file, tmp_path):
    path, record, _, _ = file
    for stored in read_weights(path):
        model = onnx.load(path)
        (initializer,) = (i for i in model.graph.initializer if i.name == stored.where)
        array = numpy_helper.to_array(initializer).copy()
        zeros = stored.zeros() if array.shape == tuple(stored.data.shape) else stored.zeros().T
        array[tuple(zeros.nonzero()[0])] += 1
        initializer.CopyFrom(numpy_helper.from_array(array, stored.where))
        onnx.save(model, tmp_path / "broken.onnx")
        assert not fxs.verify(tmp_path / "broken.onnx", record).ok, stored.where


def test_the_runtime_gives_what_torch_gives(file):
    path, _, expected, _ = file
    session = onnxruntime.InferenceSession(path)
    (given,) = session.run(None, {session.get_inputs()[0].name: INPUTS[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(given), expected.detach(), rtol=1e-3, atol=2e-2)


def test_four_bits_in_groups(tmp_path):
    codes = np.arange(-8, 8, dtype=np.int8).repeat(4).reshape(4, 16)
    scales = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1, block_size=8),
        helper.make_node("Gemm", ["x", "d"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "one layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [
            helper.make_tensor("w", TensorProto.INT4, codes.shape, codes.reshape(-1)),
            numpy_helper.from_array(scales, "s"),
        ],
    )
    path = tmp_path / "four.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    (weight,) = read_weights(path)
    assert (weight.fqn, weight.dtype, weight.scheme) == ("w", "int4", "groups of 8")
    x = torch.eye(16)
    session = onnxruntime.InferenceSession(path)
    rows = [session.run(None, {"x": row.view(1, 16).numpy()})[0] for row in x]
    assert np.array_equal(np.concatenate(rows), weight.dequantize().T.numpy())
    assert int(weight.zeros().sum()) == 4


def test_a_zero_point_that_the_exporter_casts(tmp_path):
    """As it does where folding would make many values: of 8192 rows and more."""
    table, inputs = nn.Embedding(9000, 4), (torch.arange(4),)
    quantized, verification = sparsify_and_quantize(
        *(table, fxs.WeightNormSparsifier(), inputs),
        order="sparsify_first",
        backend="pt2e",
        mapping="unstructured 50%",
    )
    torch.onnx.export(quantized, inputs, path := tmp_path / "t.onnx", dynamo=True, verbose=False)
    assert "Cast" in [node.op_type for node in onnx.load(path).graph.node]
    assert fxs.verify(path, verification.record).raise_if_lost().rows[0].zero_in_code == 18000


def test_a_zero_point_that_is_computed_is_no_zero_point(tmp_path):
    nodes = [
        helper.make_node("Add", ["z", "z"], ["zz"]),
        helper.make_node("DequantizeLinear", ["w", "s", "zz"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "one layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [
            numpy_helper.from_array(np.zeros((4, 4), np.uint8), "w"),
            numpy_helper.from_array(np.float32(1), "s"),
            numpy_helper.from_array(np.uint8(3), "z"),
        ],
    )
    onnx.save(helper.make_model(graph), tmp_path / "c.onnx")
    (weight,) = read_weights(tmp_path / "c.onnx")
    assert weight.obstacle == "its scales or zero points are computed"


def one_layer(path, nodes, *held, size=4):
    """A file of few nodes from `x` to `y`, and of initializers."""
    graph = helper.make_graph(
        nodes,
        "one layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, size])],
        [numpy_helper.from_array(array, name) for name, array in held],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


@pytest.mark.parametrize("size", [0, 2])
def test_codes_that_are_transposed_before_they_are_dequantized(tmp_path, size):
    codes = np.random.default_rng(0).integers(-3, 4, (4, 4), np.int8)
    zeros = np.array([0, 1, 2, 3], np.int8)
    scales = np.array([1, 2, 3, 4], np.float32)
    if size:
        zeros, scales = zeros.repeat(2).reshape(2, 4), scales.repeat(2).reshape(2, 4)
    settings = {"axis": 0} | ({"block_size": size} if size else {})
    path = one_layer(
        tmp_path / "t.onnx",
        [
            helper.make_node("Transpose", ["w"], ["t"]),
            helper.make_node("DequantizeLinear", ["t", "s", "z"], ["d"], **settings),
            helper.make_node("MatMul", ["x", "d"], ["y"]),
        ],
        *(("w", codes), ("s", scales), ("z", zeros)),
    )
    (weight,) = read_weights(path)
    session = onnxruntime.InferenceSession(path)
    rows = [session.run(None, {"x": row.view(1, 4).numpy()})[0] for row in torch.eye(4)]
    assert np.array_equal(np.concatenate(rows), weight.dequantize().T.numpy())


def test_codes_that_are_dequantized_in_two_ways(tmp_path):
    path = one_layer(
        tmp_path / "t.onnx",
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["a"]),
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["b"]),
            helper.make_node("MatMul", ["x", "a"], ["m"]),
            helper.make_node("MatMul", ["m", "b"], ["y"]),
        ],
        *(("w", np.eye(4, dtype=np.int8)), ("s", np.float32(1)), ("z", np.int8(1))),
    )
    assert [int(weight.zeros().sum()) for weight in read_weights(path)] == [12, 4]


LAYER = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
WEIGHT = ("w", np.eye(4, dtype=np.float32))


def beside(path, size=64, location="w.bin"):
    """A file whose weight lies in another, of so many bytes."""
    model = onnx.load(one_layer(path, LAYER, WEIGHT))
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (path.parent / "w.bin").write_bytes(bytes(size))
    path.write_bytes(path.read_bytes().replace(b"w.bin", location.encode()))


def short(path):
    model = onnx.load(one_layer(path, LAYER, WEIGHT))
    model.graph.initializer[0].raw_data = bytes(61)
    path.write_bytes(model.SerializeToString())


def scales_of_another(path):
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    one_layer(path, nodes, ("w", np.eye(4, dtype=np.int8)), ("s", np.ones(3, np.float32)))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: beside(path, size=5),
        lambda path: beside(path, location="../.."),
        lambda path: beside(path, location="x.bin"),
        short,
        scales_of_another,
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, make):
    make(path := tmp_path / "damaged.onnx")
    with pytest.raises(OnnxError, match=r"damaged.onnx: cannot be read: [^\n]+$"):
        fxs.verify(path, fxs.SparsityRecord({}))


def test_booleans_are_no_weights(tmp_path):
    class Attended(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)
            self.register_buffer("mask", torch.tensor([[True, False, True, True]]))

        def forward(self, x):
            return torch.where(self.mask, self.linear(x), 0.0)

    path = tmp_path / "m.onnx"
    torch.onnx.export(Attended().eval(), (torch.randn(2, 8),), path, dynamo=True, verbose=False)
    assert [weight.fqn for weight in read_weights(path)] == ["linear.weight"]


def test_what_is_no_onnx_file(tmp_path, monkeypatch):
    (tmp_path / "text.onnx").write_text("no such thing")
    with pytest.raises(OnnxError, match=r"text.onnx: no ONNX file"):
        fxs.verify(tmp_path / "text.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(OnnxError, match=r"pip install 'fx_sparsity\[onnx\]'"):
        fxs.verify(tmp_path / "text.onnx")
