"""Bags of one size in ONNX files are lookups and sums, which every runtime takes."""

import onnx
import onnxruntime
import openvino
import torch
from torch import nn
from torch.export import Dim

import fx_sparsity as fxs
from fx_sparsity.quantization import sparsify_and_quantize
from fx_sparsity.storage import export_onnx

IDS = torch.randint(20, (6, 3), generator=torch.Generator().manual_seed(0))
IDS[2] = 4  # a bag of padding alone, where 4 is padding
ANY = Dim.DYNAMIC


SETTINGS = [
    {"mode": "sum"},
    {"mode": "sum", "padding_idx": 4},
    {"mode": "mean"},
    {"mode": "mean", "padding_idx": -16},
    {"mode": "max"},
]


class Bags(nn.Module):
    """Tables that are looked up in bags, the second with weights."""

    def __init__(self, *settings, offsets=None):
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.EmbeddingBag(20, 4, **each) for each in settings)
        self.offsets = nn.ParameterList(
            nn.Parameter(each, requires_grad=False) for each in offsets or []
        )
        self.eval()

    def forward(self, ids, weights=None):
        offsets = list(self.offsets) or [None] * len(self.tables)
        more = [None, weights, *[None] * 3]
        return torch.cat(
            [table(ids, *given) for table, *given in zip(self.tables, offsets, more, strict=False)]
        )


def exported(model, inputs, path, shapes=None):
    """How often there is a loop in the file, and what ONNX Runtime makes of inputs."""
    export_onnx(model, inputs, path, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path)

    def run(*inputs):
        names = [put.name for put in session.get_inputs()]
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return [node.op_type for node in onnx.load(path).graph.node].count("Loop"), run


def test_bags_of_one_size_are_lookups(tmp_path):
    model, inputs = Bags(*SETTINGS), (IDS, torch.rand(IDS.shape))
    loops, run = exported(model, inputs, path := tmp_path / "b.onnx", ({0: ANY, 1: ANY},) * 2)
    assert loops == 0
    compiled = openvino.Core().compile_model(openvino.convert_model(path), "CPU")
    for given in (inputs, tuple(x[1:4, :2] for x in inputs)):
        torch.testing.assert_close(run(*given), model(*given))
        theirs = compiled([x.numpy() for x in given])[0]
        torch.testing.assert_close(torch.from_numpy(theirs), model(*given), rtol=1e-2, atol=1e-2)


def test_constant_offsets(tmp_path):
    """Two that give bags of three; two that do not, which stay loops."""
    settings = [{"mode": "sum", "include_last_offset": last} for last in (False, True)]
    every, some = torch.arange(0, 18, 3), torch.tensor([0, 3])
    offsets = [every, torch.arange(0, 19, 3), some, torch.tensor([0, 3, 7])]
    model = Bags(*settings, *settings[:1] * 2, offsets=offsets)
    loops, run = exported(model, (IDS.flatten(),), tmp_path / "b.onnx")
    assert loops == 2
    torch.testing.assert_close(run(IDS.flatten()), model(IDS.flatten()))


def test_the_zeros_of_a_coded_table(tmp_path):
    model, proof = sparsify_and_quantize(
        *(Bags({"mode": "sum"}), fxs.WeightNormSparsifier(), (IDS,)),
        order="sparsify_first",
        backend="pt2e",
        mapping="rows 50%",
        dynamic_shapes=({0: ANY},),
    )
    loops, run = exported(model, (IDS,), path := tmp_path / "q.onnx", ({0: ANY},))
    assert loops == 0
    (row,) = fxs.verify(path, proof.record).raise_if_lost()
    assert (row.fqn, row.dtype, row.zero_in_code) == ("tables.0.weight", "uint8", 40)
    torch.testing.assert_close(run(IDS[:4]), model(IDS[:4]), rtol=1e-3, atol=1e-4)
