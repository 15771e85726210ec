"""The bars of the pipelines' benchmark, without running any."""

import torch

from tests.benchmarks.bench_pipelines import ROWS, Found, error

MET = Found(1.0, [], 1e-2, 1e-4, (0.98, 1.1, 1.2), 3.0, (10, 20), 0, "")


def test_bars() -> None:
    def missed(name: str = "cnn-compile-sparsify_first", **other: object) -> int:
        return len(list(Found(**{**vars(MET), **other}).missed(name)))

    assert missed() == 0
    assert missed(zeros=0.999999) == 1
    assert missed(faults=["head.0.weight: 3 kept values became zero"]) == 1
    assert missed(deployed=2e-2) == 1
    assert missed(speed=(0.8, 0.9, 0.99)) == 1
    assert missed("cnn-onnx-sparsify_first", speed=(0.8, 0.9, 0.99), recompiled=None) == 0
    assert missed(recompiled=1) == 1


def test_every_combination_is_a_row() -> None:
    assert len(set(ROWS)) == 3 * 4 * 2


def test_error_is_relative() -> None:
    x = torch.tensor([3.0, 4.0])
    assert error(x * 1.5, x) == 0.5
