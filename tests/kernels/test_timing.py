import json
import time

import pytest
import torch

from fx_sparsity.kernels import timing
from fx_sparsity.kernels.layers import DenseLinear
from fx_sparsity.kernels.tables import read_table


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
    ],
)
def test_dense_forms_compute_the_layer(dense, input_dtype):
    x = torch.randn(3, 64).to(input_dtype)
    scale = 1 if dense.scale is None else dense.scale.view(-1, 1)
    expected = x.double() @ (dense.weight.double() * scale).t()
    forms = timing._dense_forms(dense, x)
    assert len(forms) >= 2
    for name, (make, _) in forms.items():
        found = make(dense)(x)
        assert found.shape == (3, 48)
        if name != "onednn.qlinear":  # reads codes of its own
            torch.testing.assert_close(
                found.double(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())
            )


def test_a_measurement_tells_the_faster_one(monkeypatch):
    """Against dense forms that sleep, packed wins; against ones that do nothing, it loses."""
    x = torch.zeros(2, 48)

    def slow(layer):
        return lambda _: (time.sleep(2e-3), x)[1]

    case = timing.Case.of(layer(), "bitmask", 2, torch.float32, 1)
    for make, faster in ((slow, True), (lambda layer: lambda _: x, False)):
        monkeypatch.setattr(
            timing, "_dense_forms", lambda *_, make=make: {"fake": (make, torch.float32)}
        )
        measured = timing.measure(case, layer(), {})
        assert measured.dense == "fake"
        assert measured.faster is faster
        assert measured.at_least <= measured.gain


def test_tables_are_measured_in_bags():
    module = torch.nn.EmbeddingBag(64, 8, mode="sum")
    module.weight.data[::2] = 0
    table = read_table(module)
    case = timing.Case.of(table, "rows", 32, torch.int64, 1)
    assert case.key == "rows 50% float32 sum 64x8, 32 x int64, in 1 MiB"
    measured = timing.measure(case, table, {})
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


def test_threads_and_the_model_around_are_part_of_the_case():
    small, large = (
        timing.Case.of(layer(), "bitmask", 1, torch.float32, n) for n in (1 << 20, 1 << 40)
    )
    assert (small.footprint, large.footprint) == (1, 256)
    assert small.key != large.key
    assert f"{torch.get_num_threads()} threads" in timing.machine()
    assert small.key == "bitmask 40% float32 48x64, 1 x float32, in 1 MiB"


def test_the_table_lies_with_the_compiled_operators(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("FX_SPARSITY_CACHE", str(tmp_path / "chosen"))
    assert timing.path() == tmp_path / "chosen" / "timings.json"
