from tests.benchmarks import bench_auto
from tests.benchmarks.bench_auto import Row, Speed


def test_noise_alone_is_no_verdict():
    even = [1.0] * 17
    assert not Speed.of(even, [1.0 + 0.01 * (i % 2) for i in range(17)]).slower
    assert Speed.of(even, [1.1] * 17).slower
    assert not Speed.of(even, [1.1] * 12 + [0.9] * 5).slower
    assert Speed.of(even, [1.1] * 13 + [0.9] * 4).slower


def line(zeros, *ratios):
    speeds = {
        tokens: Speed.of([ratio] * 17, [1.0] * 17)
        for tokens, ratio in zip(bench_auto.TOKENS, ratios, strict=False)
    }
    return bench_auto.line((64, 32), "bf16", Row(zeros, "nm up to 4", speeds, "measured 2x at 1"))


def test_the_verdict_names_what_is_slower():
    table = [line("2:4", 2.0, 1.5), line("50%")]
    assert "dense" in table[1]
    assert bench_auto.verdict(table) == (
        "2 speeds of lowered layers, the least 1.50; nothing is slower than dense beyond the noise"
    )
    table.append(line("70%", 2.0, 0.9))
    assert bench_auto.verdict(table).splitlines() == [
        "4 speeds of lowered layers, the least 0.90; SLOWER than dense beyond the noise:",
        table[2],
    ]


def test_pieces_of_a_table_are_put_together_in_order():
    before = [line("2:4", 2.0), line("32x32 50%", 1.0), line("2:4", 9.0).replace("bf16", "f32 ")]
    after = bench_auto.merged(before, [line("50%"), line("2:4", 3.0)])
    assert after == [before[2], line("50%"), line("2:4", 3.0), before[1]]
