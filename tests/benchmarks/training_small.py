"""Small models, trained sparse by every algorithm: the example's language model, and a CNN.

Every method starts from the same dense model of its seed and takes as many steps on the same data.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fx_sparsity as fxs
from examples.prune_language_model import LanguageModel, load_text, sample
from fx_sparsity.pruning.methods import (
    ALPS,
    CalibratedSparsifier,
    ExactUpdate,
    ReorderedSparseGPTSparsifier,
    Swaps,
)
from fx_sparsity.training import (
    ELSA,
    SET,
    Distillation,
    GradualMagnitude,
    RigL,
    Sparsify,
    StraightThrough,
    TrainingMethod,
)

PATTERNS = {
    "80%": "unstructured 80%",
    "90%": "unstructured 90%",
    "95%": "unstructured 95%",
    "2:4": "2:4",
    "16x4": "block:16x4 80%",
}
SEEDS = 3
STUDENT_T = 2.92
"""Of three seeds: half the width of an interval of 90%, in standard errors."""


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        make: a new model.
        mapping: config -> which weights get it.
        batch: seed -> inputs and what is wanted, one batch after another.
        loss: outputs, what is wanted -> nats, one for each element.
        held_out: inputs and what is wanted.
        dense_rate: learning rate of the dense training.
        rate: the same of what follows.
    """

    make: Callable[[], nn.Module]
    mapping: Callable[[str], fxs.SparsityMapping]
    batch: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    loss: Callable[[Tensor, Tensor], Tensor]
    held_out: tuple[Tensor, Tensor]
    dense_rate: float
    rate: float


# -- tasks ---------------------------------------------------------------------------------------


def language_task() -> Task:
    """Bytes of Python's standard library, judged by files that were never seen."""
    train, held = load_text()
    judged = sample(held, 512, torch.Generator().manual_seed(1))

    def batch(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            text = sample(train, 16, generator)
            yield text[:, :-1], text[:, 1:]

    return Task(
        make=LanguageModel,
        mapping=lambda config: fxs.SparsityMapping().set_module_name_regex("blocks", config),
        batch=batch,
        loss=lambda logits, wanted: F.cross_entropy(
            logits.transpose(1, 2), wanted, reduction="none"
        ),
        held_out=(judged[:, :-1], judged[:, 1:]),
        dense_rate=4e-3,
        rate=2e-3,
    )


def image_task() -> Task:
    """Ten smooth patterns, shifted and in noise, 16 x 16."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(10, 1, 4, 4, generator=generator)
    classes = F.interpolate(coarse, (16, 16), mode="bicubic")

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        wanted = torch.randint(10, (count,), generator=generator)
        shifts = torch.randint(16, (count, 2), generator=generator).tolist()
        images = torch.stack(
            [classes[k].roll(shift, (1, 2)) for k, shift in zip(wanted, shifts, strict=True)]
        )
        return images + 1.5 * torch.randn(images.shape, generator=generator), wanted

    def batch(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(64, generator)

    def make() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )

    def mapping(config: str) -> fxs.SparsityMapping:
        return fxs.SparsityMapping().set_module_name_regex("^[24]$", config)

    return Task(
        make=make,
        mapping=mapping,
        batch=batch,
        loss=lambda logits, wanted: F.cross_entropy(logits, wanted, reduction="none"),
        held_out=draw(4096, torch.Generator().manual_seed(99)),
        dense_rate=3e-3,
        rate=2e-3,
    )


TASKS = {"lm": language_task, "cnn": image_task}


# -- training ------------------------------------------------------------------------------------


def train_dense(task: Task, seed: int, steps: int) -> nn.Module:
    """A model that was trained for so many steps."""
    torch.manual_seed(seed)
    model = task.make()
    optimizer = adam(model, task.dense_rate)
    fit(model, task, seed, steps, optimizer, task.dense_rate)
    return model


def adam(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.95))


def fit(
    model: nn.Module,
    task: Task,
    seed: int,
    steps: int,
    optimizer: torch.optim.Optimizer,
    rate: float,
    distillation: Distillation | None = None,
) -> None:
    """Train with a cosine over the steps, on the loss or by distillation."""
    data = task.batch(seed + 1000)
    for step in range(steps):
        warm = min(1.0, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        inputs, wanted = next(data)
        if distillation is None:
            loss = task.loss(model(inputs), wanted).mean()
        else:
            loss = distillation((inputs,)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def judge(model: nn.Module, task: Task) -> float:
    """Nats on what is held out."""
    model.eval()
    inputs, wanted = task.held_out
    parts = zip(inputs.split(128), wanted.split(128), strict=True)
    found = [task.loss(model(x), y).flatten() for x, y in parts]
    return float(torch.cat(found).mean())


def one_shot(dense: nn.Module, task: Task, config: str, seed: int) -> tuple[nn.Module, Any, str]:
    """The best that pruning at once gives: model, record and which method that was."""
    data = task.batch(seed + 2000)
    batches = [(next(data)[0],) for _ in range(8)]
    methods: dict[str, Callable[[], CalibratedSparsifier]] = {
        "ALPS": ALPS,
        "SparseGPT + swaps": lambda: fxs.Pipeline(
            ReorderedSparseGPTSparsifier(), Swaps(), ExactUpdate()
        ),
        "SparseGPT": fxs.SparseGPTSparsifier,
    }
    found = []
    for name, make in methods.items():
        model, method = copy.deepcopy(dense).eval().requires_grad_(False), make()
        try:
            fxs.prune(model, method, batches, task.mapping(config))
        except fxs.FxSparsityError:
            if name != "SparseGPT + swaps":
                raise
            continue  # swaps and reordering are for single elements, not for blocks
        model, record = fxs.squash(model, method)
        found.append((judge(model, task), name, model.requires_grad_(True), record))
    _, name, model, record = min(found, key=lambda one: one[0])
    return model, record, name


def train_sparse(
    dense: nn.Module, task: Task, config: str, seed: int, steps: int, kind: str
) -> Any:
    """Nats of one algorithm, and zeros checked."""
    model = copy.deepcopy(dense)
    if kind in ("static", "distilled"):
        model, record, _ = one_shot(dense, task, config, seed)
        optimizer = adam(model, task.rate)
        held = fxs.hold(optimizer, model, record)
        teacher = Distillation(model, dense.eval()) if kind == "distilled" else None
        fit(model, task, seed, steps, optimizer, task.rate, teacher)
        held.remove()
    else:
        every, end = max(steps // 50, 1), steps * 3 // 4
        methods: dict[str, Callable[[], TrainingMethod]] = {
            "gradual": lambda: GradualMagnitude(every=every, end=end),
            "SET": lambda: SET(every=every, end=end, seed=seed),
            "RigL": lambda: RigL(every=every, end=end),
            "SR-STE": lambda: StraightThrough(end=end),
            "ELSA": lambda: ELSA(end=end, every=max(steps // 100, 1)),
        }
        method = methods[kind]()
        fxs.prepare(model, method, (task.held_out[0][:2],), task.mapping(config))
        optimizer, schedule = adam(model, task.rate), None
        if kind == "gradual" and not config.startswith("2:4"):
            updates = len(range(0, end, every))
            schedule = fxs.CubicSL(method, init_t=0, delta_t=1, total_t=updates - 1)
        run = Sparsify(model, method, optimizer, schedule, steps)
        fit(model, task, seed, steps, optimizer, task.rate)
        run.remove()
        model, record = fxs.squash(model, method)
    fxs.verify(model, record).raise_if_lost()
    return judge(model, task)


KINDS = ("static", "gradual", "SET", "RigL", "SR-STE", "ELSA", "distilled")


def measure(task_name: str, config: str, steps: int, once: Callable[[str, Any], Any]) -> Any:
    """Kind -> nats of each seed; `dense` and `one-shot` among them."""
    task = TASKS[task_name]()
    found: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        dense: list[nn.Module] = []

        def model(seed: int = seed, dense: list[nn.Module] = dense) -> nn.Module:
            if not dense:
                dense.append(train_dense(task, seed, 2 * steps))
            return copy.deepcopy(dense[0])

        def longer(seed: int = seed, model: Any = model) -> float:
            trained = model()
            fit(trained, task, seed, steps, adam(trained, task.rate), task.rate)
            return judge(trained, task)

        stages: dict[str, Callable[[], float]] = {
            "dense": longer,
            "one-shot": lambda seed=seed, model=model: judge(
                one_shot(model(), task, config, seed)[0], task
            ),
            **{
                kind: lambda kind=kind, seed=seed, model=model: train_sparse(
                    model(), task, config, seed, steps, kind
                )
                for kind in KINDS
            },
        }
        for kind, work in stages.items():
            found.setdefault(kind, []).append(once(f"{kind} {seed} of {steps}", work))
    return found


def table(found: dict[str, list[float]]) -> list[str]:
    """A line a kind: nats, and what it is below one-shot, paired by seed, with an interval."""
    best = torch.tensor(found["one-shot"], dtype=torch.float64)
    lines = [f"{'':<12}{'nats':>8}{'below one-shot':>26}"]
    for kind, nats in sorted(found.items(), key=lambda item: sum(item[1])):
        below = best - torch.tensor(nats, dtype=torch.float64)
        wide = STUDENT_T * float(below.std()) / math.sqrt(len(nats))
        gain = float(below.mean())
        lines.append(f"{kind:<12}{sum(nats) / len(nats):>8.4f}{gain:>14.4f} +- {wide:.4f}")
    return lines


def missed(row: str, found: dict[str, list[float]]) -> list[str]:
    """Kinds that are no better than the best one-shot, over all seeds."""
    return [
        f"{row}, {kind}: no better than one-shot"
        for kind in KINDS
        if sum(found[kind]) >= sum(found["one-shot"])
    ]


def orders(found: dict[str, list[float]]) -> str:
    """Whether the papers' orders are seen."""
    mean = {kind: sum(nats) for kind, nats in found.items()}
    said = {
        "RigL before SET": mean["RigL"] < mean["SET"],
        "SET before static": mean["SET"] < mean["static"],
        "SR-STE before static": mean["SR-STE"] < mean["static"],
        "ELSA the best of all": mean["ELSA"] == min(mean[kind] for kind in KINDS),
    }
    return "; ".join(f"{what}: {'yes' if true else 'no'}" for what, true in said.items())
