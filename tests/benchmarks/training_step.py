"""What live masks cost a training step: forward, backward and the optimizer, in seconds of all cores.

Seconds of CPU say what a step costs whatever else the machine does. Dense and masked steps take
turns, and the fastest of each counts.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fx_sparsity as fxs
from examples.prune_language_model import LanguageModel
from fx_sparsity.training import GradualMagnitude, RigL, Sparsify, StraightThrough, TrainingMethod

STEP, UPDATE, EVERY = 1.15, 0.05, 100
METHODS: dict[str, Callable[[], TrainingMethod]] = {
    "gradual": lambda: GradualMagnitude(every=EVERY),
    "RigL": lambda: RigL(every=EVERY),
    "SR-STE": lambda: StraightThrough(every=EVERY),
}


def mlp() -> tuple[nn.Module, Tensor]:
    """Two layers, 4096 wide, on 512 tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 4096))
    return model, torch.randn(512, 4096)


def transformer() -> tuple[nn.Module, Tensor]:
    """The example's language model, wider, on 16 x 64 bytes."""
    torch.manual_seed(0)
    return LanguageModel(dim=384, layers=4, heads=6), torch.randint(256, (16, 64))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "transformer": transformer,
}


class Training:
    """One model in training.

    Args:
        make: the model and its inputs.
        method: masks it; None leaves it dense.
        compiled: whether by torch.compile.
    """

    def __init__(self, make: Any, method: TrainingMethod | None, compiled: bool) -> None:
        self.model, self.inputs = make()
        self.method = method
        if method is not None:
            mapping = fxs.SparsityMapping().set_global("unstructured 80%")
            mapping.set_object_type(nn.Embedding, None)
            if hasattr(self.model, "head"):
                mapping.set_module_name("head", None)
            fxs.prepare(self.model, method, (self.inputs,), mapping)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        if method is not None:
            Sparsify(self.model, method, self.optimizer)
        self._run = torch.compile(self.model) if compiled else self.model

    def step(self) -> float:
        """Seconds of all cores."""
        start = time.process_time()
        self.optimizer.zero_grad()
        outputs = self._run(self.inputs)
        if self.inputs.is_floating_point():
            loss = F.mse_loss(outputs, self.inputs)
        else:
            loss = F.cross_entropy(outputs.transpose(1, 2), self.inputs)
        loss.backward()
        self.optimizer.step()
        return time.process_time() - start

    def update(self) -> float:
        """Seconds of all cores that one update of the masks takes."""
        assert self.method is not None
        start = time.process_time()
        self.method.step()
        return time.process_time() - start


def measure_step(name: str, compiled: bool, turns: int) -> dict[str, dict[str, float]]:
    """Method -> `dense`, `masked` and `update`, in seconds."""
    found = {}
    for kind, method in METHODS.items():
        dense = Training(MODELS[name], None, compiled)
        masked = Training(MODELS[name], method(), compiled)
        for _ in range(2):
            dense.step(), masked.step()
        pairs = [(dense.step(), masked.step()) for _ in range(turns)]
        updates = [masked.update() for _ in range(3)]
        a, b = (min(times) for times in zip(*pairs, strict=True))
        found[kind] = {"dense": a, "masked": b, "update": min(updates)}
    return found


def told(row: str, found: dict[str, dict[str, float]]) -> tuple[list[str], list[str]]:
    """Lines, and missed bars."""
    lines = [
        f"{row}: milliseconds of all cores",
        f"{'':<10}{'dense':>10}{'masked':>10}{'ratio':>8}{'an update':>12}{'of its steps':>14}",
    ]
    missed = []
    for kind, times in found.items():
        ratio = times["masked"] / times["dense"]
        share = times["update"] / (EVERY * times["masked"])
        lines.append(
            f"{kind:<10}{1e3 * times['dense']:>10.1f}{1e3 * times['masked']:>10.1f}{ratio:>8.2f}"
            f"{1e3 * times['update']:>12.1f}{share:>14.2%}"
        )
        if ratio > STEP:
            missed.append(f"{row}, {kind}: a step takes {ratio:.2f} of a dense one, bar {STEP}")
        if share > UPDATE:
            missed.append(f"{row}, {kind}: updates take {share:.1%} of the steps, bar {UPDATE:.0%}")
    return lines, missed
