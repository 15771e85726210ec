import pytest

from tests.benchmarks import bench_generate


def test_targets_compare_the_best_of_each():
    taken = {
        "dense bf16, frozen": 0.04,
        "dense bf16": 0.05,
        "dense int8 dynamic": 0.02,
        "sparse int8 50% dynamic": 0.0125,
        "sparse bf16 70%": 0.025,
    }
    text = bench_generate.report(100_000_000, taken, dict.fromkeys(taken, 2**20), 3)
    assert "sparse int8 50% dynamic over dense int8 dynamic: 1.60x (1.5x met)" in text
    assert "sparse int8 50% dynamic over dense bf16, frozen: 3.20x (3.0x met)" in text
    assert "sparse bf16 70% over dense bf16, frozen: 1.60x (1.8x missed)" in text


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_a_small_model_is_timed():
    names = ["dense bf16", "sparse int8 50% dynamic"]
    text = bench_generate.table(64, 1, 1, names)
    assert all(name in text for name in names)
