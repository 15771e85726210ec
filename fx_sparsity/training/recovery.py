"""How a model is recovered, and what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fx_sparsity.reports import Bytes, Report, Table
from fx_sparsity.training.distill import Compare


@dataclass(frozen=True)
class Recovery:
    """How a pruned model is trained, see `recover`.

    Attributes:
        steps: of the optimizer.
        batches_per_step: whose gradients are summed up, every token counting the same.
        learning_rate: at the most; it rises for four steps and falls as a cosine to 5%.
        compare: see `Distillation`; so are the next three.
        temperature: of the probabilities.
        hidden: modules whose outputs are compared, too.
        autocast: dtype to compute in, None or `torch.bfloat16`.
        held_out: share of the batches that are not trained on, and judged by before and after.
        seed: of the order of batches, which is another one each time around, and of adapters.
    """

    steps: int = 100
    batches_per_step: int = 2
    learning_rate: float = 1e-4
    compare: Compare = "kl"
    temperature: float = 1.0
    hidden: Sequence[str] | Literal["blocks"] = ()
    autocast: torch.dtype | None = None
    held_out: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batches_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least one, found {getattr(self, name)!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected more than 0, found {self.learning_rate!r}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a share in [0, 1), found {self.held_out!r}")
        if self.autocast == torch.float16:
            raise ValueError("autocast: float16 needs a scaled loss; use torch.bfloat16")


@dataclass(frozen=True)
class RecoveryStep:
    """One step of the optimizer.

    Attributes:
        step: its number, from 1.
        loss: of its batches, before it.
        gradient: norm, before it was shortened.
    """

    step: int
    loss: float
    gradient: float


@dataclass(frozen=True)
class RecoveryReport(Report):
    """What `recover` did.

    Attributes:
        rows: the steps.
        before: mean loss on the batches that were held out, before; None without any.
        after: the same afterwards.
        trained: how many values were trained; of a pruned weight, those that are kept.
        seconds: that it took, all runs together.
        memory: bytes of `"model"`, `"teacher"`, `"gradients"` and `"optimizer"` (with the float32
            copies of weights of other dtypes). Activations come on top.
    """

    rows: tuple[RecoveryStep, ...]
    before: float | None
    after: float | None
    trained: int
    seconds: float
    memory: Mapping[str, int]

    @property
    def tables(self) -> tuple[Table, ...]:
        """The steps, and the memory."""
        steps = [(row.step, row.loss, row.gradient) for row in self.rows]
        sizes = [(what, Bytes(size)) for what, size in self.memory.items()]
        return Table(("step", "loss", "gradient"), steps), Table(("memory of", "bytes"), sizes)

    @property
    def summary(self) -> str:
        """See `Tabular.summary`."""
        judged = ""
        if self.before is not None and self.after is not None:
            worse = ", which is worse" if self.after > self.before else ""
            judged = f"; held-out loss {self.before:.4g} before, {self.after:.4g} after{worse}"
        total = Bytes(sum(self.memory.values()))
        return (
            f"{len(self.rows)} steps, {self.trained:,} values trained in {self.seconds:.0f} s, "
            f"{total} beside activations{judged}"
        )

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.tables), self.summary])
