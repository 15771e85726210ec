"""What is exported from a quantized graph, saved and loaded in another process is known to its record."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.quantization import sparsify_and_quantize

INPUTS = (torch.arange(28).remainder(11).view(4, 7),)


class Tagger(nn.Module):
    """A table tied to the head, packed projections, and a layer that stays in float."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        hidden = self.table(tokens)
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        return self.head(self.conv(hidden.transpose(1, 2)).transpose(1, 2))


@pytest.fixture(scope="module", params=["sparsify_first", "quantize_first"])
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    mapping = fxs.SparsityMapping().set_global("unstructured 50%")
    sparsifier, model = fxs.WeightNormSparsifier(), Tagger().eval()
    quantized, verification = sparsify_and_quantize(
        model, sparsifier, INPUTS, order=request.param, backend="pt2e", mapping=mapping
    )
    path = tmp_path_factory.mktemp("exported") / "tagger.pt2"
    torch.export.save(torch.export.export(quantized, INPUTS), path)
    return path, verification


@pytest.mark.parametrize("decomposed", [False, True])
def test_it_is_verified_after_a_reload(saved, decomposed):
    path, before = saved
    program = torch.export.load(path)
    after = fxs.verify(program.run_decompositions() if decomposed else program, before.record)
    after.raise_if_lost()
    assert [(row.fqn, row.dtype, row.share) for row in after.rows] == [
        (row.fqn, row.dtype, row.share) for row in before.rows
    ]
    # The tied weight is stored twice, and both are read.
    assert [row.fqn for row in after.rows].count("table.weight") == 2


def test_parts_and_transposes_are_verified_when_decomposed():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed = nn.Parameter(torch.randn(16, 16))
            self.stored_as_in_out = nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            query, key = self.packed.chunk(2)
            x = torch.cat([nn.functional.linear(x, query), nn.functional.linear(x, key)], 1)
            return nn.functional.linear(x, self.stored_as_in_out.t())

    inputs = (torch.randn(2, 16),)
    quantized, verification = sparsify_and_quantize(
        Split().eval(),
        fxs.WeightNormSparsifier(),
        inputs,
        order="sparsify_first",
        backend="pt2e",
        mapping="2:4",
    )
    verification.raise_if_lost()
    program = torch.export.export(quantized, inputs).run_decompositions()
    fxs.verify(program, verification.record).raise_if_lost()
    # Codes that are not the weight as it was do not have its name.
    assert {"packed", "stored_as_in_out"}.isdisjoint(program.state_dict)
    for name, tensor in program.state_dict.items():
        if tensor.ndim > 1:
            tensor += 1
            assert not fxs.verify(program, verification.record).ok, name
            tensor -= 1


def test_codes_have_the_names_of_their_weights(saved):
    path, _ = saved
    state = torch.export.load(path).state_dict
    dtypes = {name: tensor.dtype for name, tensor in state.items() if tensor.ndim > 1}
    # The head, which is tied to the table, has codes of its own.
    assert [dtypes.pop(name) for name in [*dtypes] if name.startswith("_frozen")] == [torch.int8]
    assert dtypes == {
        "table.weight": torch.uint8,
        "attention.in_proj_weight": torch.int8,
        "attention.out_proj.weight": torch.int8,
        "conv.weight": torch.float32,
    }
    assert state["attention.out_proj.weight_scale"].shape == (32,)


def test_a_lost_zero_is_seen_after_a_reload(saved):
    path, before = saved
    program = torch.export.load(path)
    for name, tensor in program.state_dict.items():
        if tensor.dtype not in (torch.int8, torch.uint8):
            continue
        kept, codes = tensor.clone(), tensor.view(-1)
        for place in range(len(codes)):  # until it hits a zero
            codes[place] += 1
            if not fxs.verify(program, before.record).ok:
                break
            tensor.copy_(kept)
        else:
            pytest.fail(f"{name}: no change of a code is seen")
        tensor.copy_(kept)


@pytest.mark.parametrize("saved", ["sparsify_first"], indirect=True)
def test_a_fresh_process_reads_it(saved, tmp_path):
    path, before = saved
    before.record.save(tmp_path / "record")
    code = (
        "import sys, torch, fx_sparsity as fxs\n"
        "import torchao.quantization.pt2e  # has the operators of the program\n"
        "record = fxs.SparsityRecord.load(sys.argv[2])\n"
        "print(fxs.verify(torch.export.load(sys.argv[1]), record).raise_if_lost().ok)"
    )
    line = [sys.executable, "-c", code, str(path), str(tmp_path / "record")]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip().endswith("True")
