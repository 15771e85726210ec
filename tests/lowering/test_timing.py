import json
import time
from dataclasses import replace

import pytest
import torch

from fx_sparsity.lowering import timing
from fx_sparsity.lowering.dense_tables import read_table
from fx_sparsity.lowering.layers import DenseLinear


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "folders", lambda: [tmp_path])
    return tmp_path


def layer(dtype=torch.float32, quantize_input="none"):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    weight[torch.rand(48, 64, generator=generator) < 0.6] = 0
    if dtype != torch.int8:
        return DenseLinear(weight.to(dtype), input_dtype=dtype)
    return DenseLinear((weight * 30).to(torch.int8), None, torch.rand(48), quantize_input)


@pytest.mark.parametrize(
    ("dense", "input_dtype"),
    [
        (layer(), torch.float32),
        (layer(torch.bfloat16), torch.bfloat16),
        (layer(torch.int8), torch.bfloat16),
        (layer(torch.int8, "token_symmetric"), torch.float32),
        (replace(layer(torch.int8), from_codes=True), torch.float32),
    ],
)
def test_dense_forms_compute_the_layer(dense, input_dtype):
    scale = 1 if dense.scale is None else dense.scale.view(-1, 1)
    forms = timing._dense_forms(dense, input_dtype)
    assert len(forms) >= 2
    for name, (make, _) in forms.items():
        form = make(dense)
        for tokens in (3, 1, 3):
            x = torch.randn(tokens, 64).to(input_dtype)
            expected = x.double() @ (dense.weight.double() * scale).t()
            found = form(x)
            assert found.shape == (tokens, 48)
            if name != "onednn.qlinear":  # reads codes of its own
                torch.testing.assert_close(
                    found.double(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())
                )


def test_where_codes_are_dequantized_dense_multiplies_the_codes():
    plain = layer(torch.int8)
    coded = replace(plain, from_codes=True)
    assert "onednn.qlinear" in timing._dense_forms(coded, torch.float32)
    assert "onednn.qlinear" not in timing._dense_forms(plain, torch.float32)
    assert plain.mode != coded.mode  # so that timings are not taken for each other's


def measure(dense, tokens=(2,), table=None, input_dtype=None):
    return timing.measure(
        dense,
        dense.candidates()[0],
        tokens,
        input_dtype=input_dtype or dense.input_dtype,
        model_bytes=1,
        table={} if table is None else table,
    )


def sleeping(seconds):
    def make(layer):
        return lambda x: (time.sleep(seconds), x)[1]

    return make, torch.float32


def test_a_measurement_tells_the_faster_one(monkeypatch):
    """Against dense forms that sleep, packed wins; against ones that do nothing, it loses."""
    for forms, fastest, faster in (
        ({"slow": sleeping(2e-3), "slower": sleeping(3e-3)}, "slow", True),
        (
            {"slow": sleeping(2e-3), "none": (lambda layer: lambda x: x, torch.float32)},
            "none",
            False,
        ),
    ):
        monkeypatch.setattr(timing, "_dense_forms", lambda *_, forms=forms: forms)
        measured = measure(layer())["bitmask"][2]
        assert measured.dense == fastest
        assert measured.faster is faster
        assert measured.at_least <= measured.gain


def test_only_what_the_table_lacks_is_measured(monkeypatch):
    table = {}
    first = measure(layer(), (2, 1), table)
    assert set(first["bitmask"]) == {1, 2}
    assert len(table) == 2
    compared = []
    known = first["bitmask"][1]
    monkeypatch.setattr(
        timing,
        "_compared",
        lambda _, ours, xs: compared.append(len(xs[0])) or dict.fromkeys(ours, known),
    )
    assert measure(layer(), (1, 2), table) == first
    assert compared == []
    measure(layer(), (1, 2, 3), dict(table))
    assert compared == [3]


def test_tables_are_measured_in_bags():
    module = torch.nn.EmbeddingBag(64, 8, mode="sum")
    module.weight.data[::2] = 0
    table = {}
    measured = measure(read_table(module), (32,), table)["rows"][32]
    assert list(table) == ["rows 62% float32 sum 64x8, 32 x int64, in 1 MiB"]
    assert measured.packed_us > 0
    assert measured.dense == "eager"


def test_the_table_is_read_back_merged_and_forgotten(folder):
    assert timing.read_table() == {}
    one, two = (
        timing.Timing("eager", 2.0, 1.0, 2.0, 1.9),
        timing.Timing("frozen", 1.0, 1.0, 1.0, 0.9),
    )
    timing.write_table({"one": one})
    timing.write_table({"two": two})
    assert timing.path().parent == folder
    assert timing.read_table() == {"one": one, "two": two}
    assert set(json.loads(timing.path().read_text())) == {timing.machine()}
    timing.forget()
    assert timing.read_table() == {}
    timing.forget()


def test_a_table_that_cannot_be_read_is_replaced(folder, caplog):
    timing.path().write_text("{")
    assert timing.read_table() == {}
    assert "cannot be read" in caplog.text
    timing.path().write_text(json.dumps({timing.machine(): {"one": {"other": 1}}}))
    assert timing.read_table() == {}
    assert "another version" in caplog.text


def case(dense, packing="bitmask", model_bytes=1 << 20):
    return timing.Case.of(dense, packing, dense.pack(packing), 1, torch.float32, model_bytes)


def test_the_model_around_is_part_of_the_case():
    small, large = (case(layer(), model_bytes=n) for n in (1 << 20, 1 << 40))
    assert (small.footprint, large.footprint) == (1, 256)
    assert small.key != large.key
    assert small.key == "bitmask 44% float32 48x64, 1 x float32, in 1 MiB"


def test_zeros_of_one_number_in_other_places_are_other_cases():
    """A block packing takes as long as the blocks that it stores, not as there are non-zeros."""
    scattered, rows, squares = (torch.zeros(64, 64) for _ in range(3))
    scattered[::2, ::4] = 1
    rows[:16, ::2] = 1
    squares[:32, :16] = 1
    weights = [DenseLinear(weight) for weight in (scattered, rows, squares)]
    assert len({dense.density for dense in weights}) == 1
    keys = [case(dense, "block").key for dense in weights]
    assert keys == [
        "block 1x1 26% float32 64x64, 1 x float32, in 1 MiB",
        "block 1x1 14% float32 64x64, 1 x float32, in 1 MiB",
        "block 2x16 12% float32 64x64, 1 x float32, in 1 MiB",
    ]


def test_threads_and_kernels_are_part_of_the_machine(monkeypatch):
    kernels = timing.machine()
    assert f"{torch.get_num_threads()} threads" in kernels
    assert "kernels-" in kernels
    monkeypatch.setenv("FX_SPARSITY_CPU", "avx2")
    assert timing.machine() == f"{kernels}, avx2"
    monkeypatch.delenv("FX_SPARSITY_CPU")
    monkeypatch.setenv("FX_SPARSITY_KERNELS", "0")
    assert "plain torch" in timing.machine()


def test_the_table_lies_with_the_compiled_operators(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("FX_SPARSITY_CACHE", str(tmp_path / "chosen"))
    assert timing.path() == tmp_path / "chosen" / "timings.json"
