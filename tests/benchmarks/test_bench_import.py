"""The benchmark runs; how fast depends on the machine, and is not for a test to say."""

from tests.benchmarks import bench_import


def test_the_bar_is_named_without_a_run(capsys):
    assert bench_import.main(["--list"]) == 0
    assert capsys.readouterr().out == "import fx_sparsity takes at most 1.25 times import torch\n"


def test_check_says_whether_the_bar_is_met(capsys, monkeypatch):
    for ours, code in ((1.25, 0), (1.3, 1)):
        times = {"torch": 1.0, "fx_sparsity": ours}
        monkeypatch.setattr(bench_import, "seconds", times.__getitem__)
        assert bench_import.main(["--runs", "1"]) == 0
        assert bench_import.main(["--check", "--runs", "1"]) == code
        assert f"fx_sparsity {ours:8} {ours:12}" in capsys.readouterr().out
