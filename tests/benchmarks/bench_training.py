"""Sparse training: what it costs, and how good it is, from algorithms to recovered models.

    python -m tests.benchmarks.bench_training --check --row minilm-80%

Rows of a small model compare all algorithms, seeds paired; `step-` are the cost of masks; `smollm2-`
recover a language model by distillation after the best one-shot pruning, which is made first and
kept (`--row smollm2-2:4-one-shot`), with controls; `minilm-` is a sentence encoder in 16x4 blocks.
What was measured before lies under `--state`, and is not measured again; a recovery that was stopped
goes on. Models and text are those of `bench_accuracy`. `--steps` is for trying a row quickly.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import training_encoder, training_recovery, training_small, training_step
from tests.benchmarks.bench_accuracy import REBUILT, Options
from tests.benchmarks.bench_masks import machine

TABLE = Path(__file__).with_name("training.txt")
STATE = Path(__file__).parents[2] / "build" / "training"
SMALL = {"lm": 1500, "cnn": 1500}
"""Steps of every algorithm: 30 minutes of two cores for all of them and three seeds."""
TURNS = 10
Measured = tuple[list[str], list[str]]


@dataclass(frozen=True)
class Row:
    """One thing to show.

    Attributes:
        bars: in words.
        steps: of training, unless told otherwise.
        measure: options, steps -> lines of the table, and the bars that are missed.
    """

    bars: str
    steps: int
    measure: Callable[[Options, int], Measured]


def small(options: Options, task: str, config: str, steps: int) -> Measured:
    """All algorithms on a small model."""
    found = training_small.measure(task, config, steps, options.once)
    lines = [f"{options.name}: {steps} steps after {2 * steps} dense ones, seeds paired"]
    lines += [*training_small.table(found), training_small.orders(found)]
    return lines, training_small.missed(options.name, found)


def step(options: Options, model: str, compiled: bool, turns: int) -> Measured:
    """What masks cost."""
    found = options.once(
        f"{turns} turns", lambda: training_step.measure_step(model, compiled, turns)
    )
    return training_step.told(options.name, found)


def one_shot(options: Options, pattern: str, steps: int) -> Measured:
    """The starting point of a recovery."""
    rebuilt = None if steps == 0 else REBUILT
    found = training_recovery.Pruned(options, pattern, rebuilt).make()
    return [f"{options.name}: made in {found['seconds']:.0f} s"], []


def recovery(options: Options, pattern: str, kind: str, steps: int) -> Measured:
    """A recovery by distillation, or a control."""
    return training_recovery.measure_recovery(options, pattern, kind, steps)


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for level in (80, *(n for n in training_encoder.LEVELS if n != 80)):
        bar = (
            f"a cosine of at least {training_encoder.COSINE} on held-out sentences; at least "
            f"{training_encoder.OVER_FLOAT} times faster than dense and "
            f"{training_encoder.OVER_INT8} than int8"
        )
        rows[f"minilm-{level}%"] = Row(
            bar if level == 80 else "none",
            training_encoder.STEPS,
            lambda o, n, level=level: training_encoder.measure_encoder(o, level, n),
        )
    for model in training_step.MODELS:
        for compiled in (False, True):
            rows[f"step-{model}-{'compiled' if compiled else 'eager'}"] = Row(
                f"a step at most {training_step.STEP} of a dense one; updates at most "
                f"{training_step.UPDATE:.0%} of the steps, at every {training_step.EVERY}th",
                TURNS,
                lambda o, n, m=model, c=compiled: step(o, m, c, n),
            )
    for short, pattern in {"2:4": "2:4", "50%": "unstructured 50%"}.items():
        rows[f"smollm2-{short}-one-shot"] = Row(
            "none; an hour or more",
            1,
            lambda o, n, p=pattern: one_shot(o, p, n),
        )
        for kind in training_recovery.TRAIN:
            bars = ", ".join(f"{bar} ({what})" for what, bar in training_recovery.BARS.items())
            rows[f"smollm2-{short}" if kind == "kept" else f"smollm2-{short}-{kind}"] = Row(
                f"at most {bars} of one-shot's gap, in nats" if kind == "kept" else "none",
                training_recovery.STEPS,
                lambda o, n, p=pattern, k=kind: recovery(o, p, k, n),
            )
    rows["smollm2-dense"] = Row(
        "none; beside smollm2-2:4",
        training_recovery.STEPS,
        lambda o, n: recovery(o, "2:4", "dense", n),
    )
    for task, steps in SMALL.items():
        for short, config in training_small.PATTERNS.items():
            rows[f"{task}-{short}"] = Row(
                "every algorithm better than the best one-shot",
                steps,
                lambda o, n, t=task, c=config: small(o, t, c, n),
            )
    return rows


ROWS = _rows()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", action="append", choices=ROWS, help="only this one")
    parser.add_argument("--list", action="store_true", help="name the bars, and measure nothing")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--steps", type=int, help="others than the row's own")
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--smollm2", type=Path, help="folder of the language model")
    arguments = parser.parse_args()
    if arguments.list:
        for name, row in ROWS.items():
            print(f"{name}: {row.bars}")
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"
    printed, missed = [machine()], list[str]()
    print(printed[0], flush=True)
    for name in arguments.row or ROWS:
        row = ROWS[name]
        steps = row.steps if arguments.steps is None else arguments.steps
        lines, failed = row.measure(Options(name, arguments.state, arguments.smollm2), steps)
        printed += ["", *lines]
        missed += failed
        print("", *lines, sep="\n", flush=True)
    verdict = [f"MISSED: {text}" for text in missed] or ["all bars met"]
    print("", *verdict, sep="\n")
    if arguments.write:
        TABLE.write_text("\n".join([*printed, "", *verdict]) + "\n")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
