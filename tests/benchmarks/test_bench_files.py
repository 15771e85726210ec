"""The benchmark runs, and files are as small as promised; how fast they are is for the table."""

import pytest

from tests.benchmarks import bench_files


@pytest.mark.exhaustive
def test_it_runs():
    results = bench_files.main(["--megabytes", "16", "--runs", "1"])
    shares = {(str(r.dtype)[6:], r.pattern): r.share for r in results}
    assert shares["bfloat16", "unstructured 50%"] <= 0.57
    assert shares["bfloat16", "unstructured 90%"] <= 0.17
    assert shares["int8", "unstructured 50%"] <= 0.63
    assert all(result.model > 0 for result in results)
