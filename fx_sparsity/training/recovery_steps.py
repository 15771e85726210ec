"""The steps of a recovery: gradients of a few batches, a step of AdamW, and a file in between."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.progress import progress as show_progress
from fx_sparsity.pruning.reconstruction import warm_cosine
from fx_sparsity.sparsifier.hold import Hold
from fx_sparsity.training.distill import Distillation, DistillationError
from fx_sparsity.training.recovery import Recovery, RecoveryStep

_BETAS = (0.9, 0.95)
_LONGEST = 1.0  # gradient of a step; a longer one is shortened


class RecoverySteps:
    """Trains parameters by distillation, step after step.

    Args:
        distillation: the loss.
        used: batches to train on.
        trained: name -> parameter.
        recovery: how.

    Attributes:
        optimizer: AdamW over the parameters, or over float32 copies of those of other dtypes.
        held: keeps the zeros of a squashed model; None where masks are live.
        done: the steps so far.
        seconds: that they took.
    """

    def __init__(
        self,
        distillation: Distillation,
        used: Sequence[ExampleInputs],
        trained: Mapping[str, nn.Parameter],
        recovery: Recovery,
    ) -> None:
        self._distillation, self._used, self._recovery = distillation, used, recovery
        self._trained = trained
        self._copies = {name: _float(parameter) for name, parameter in trained.items()}
        self.optimizer = AdamW(
            list(self._copies.values()), recovery.learning_rate, betas=_BETAS, weight_decay=0.0
        )
        self._schedule = LambdaLR(self.optimizer, warm_cosine(recovery.steps))
        self.held: Hold | None = None
        self.done: list[RecoveryStep] = []
        self.seconds = 0.0

    def run(self, file: "Checkpoint | None", progress: bool) -> None:
        """Take all steps that are left.

        Raises:
            DistillationError: a loss is not finite, or does not depend on what is trained.
        """
        steps = self._recovery.steps
        with show_progress("recovering", steps, progress) as advance:
            advance("from a checkpoint", len(self.done))
            while len(self.done) < steps:
                start = time.perf_counter()
                self._step(len(self.done))
                self.seconds += time.perf_counter() - start
                advance(f"loss {self.done[-1].loss:.4g}", 1)
                if file is not None and (
                    len(self.done) % file.every == 0 or len(self.done) == steps
                ):
                    file.write(self)

    def state_dict(self) -> dict[str, Any]:
        """What the steps that are left depend on."""
        return {
            "values": {name: copy.detach() for name, copy in self._copies.items()},
            "buffers": dict(self._distillation.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "random": torch.get_rng_state(),
            "done": [astuple(step) for step in self.done],
            "seconds": self.seconds,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called."""
        for name, copy in self._copies.items():
            copy.copy_(state["values"][name])
            self._write_back(name)
        for name, buffer in self._distillation.model.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        self.done = [RecoveryStep(*step) for step in state["done"]]
        self.seconds = state["seconds"]

    def memory(self) -> dict[str, int]:
        """Bytes of what there is beside activations."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        copies = [c for name, c in self._copies.items() if c is not self._trained[name]]
        return {
            "model": _bytes(self._distillation.model.parameters()),
            "teacher": _bytes(self._distillation.teacher.parameters()),
            "gradients": _bytes(self._trained.values()),
            "optimizer": _bytes([*(s for s in states if isinstance(s, Tensor)), *copies]),
        }

    def _step(self, step: int) -> None:
        loss, tokens = 0.0, 0
        for batch in self._batches(step):
            found = self._distillation(batch)
            if not found.loss.requires_grad:
                raise DistillationError(
                    "what the model gives out does not depend on anything that is trained, such as "
                    f"{next(iter(self._trained))}"
                )
            if not found.loss.isfinite():
                raise DistillationError(
                    f"step {step + 1}: the loss is {float(found.loss):.4g}; a lower learning rate, "
                    "or inputs without inf and NaN"
                )
            (found.loss * found.tokens).backward()
            loss += found.loss.item() * found.tokens
            tokens += found.tokens
        if self.held is not None:
            self.held.mask_gradients()
        for name, parameter in self._trained.items():
            copy, gradient = self._copies[name], parameter.grad
            parameter.grad = None
            copy.grad = None if gradient is None else gradient.to(copy.dtype).div_(max(tokens, 1))
        norm = nn.utils.clip_grad_norm_(self._copies.values(), _LONGEST)
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad()
        for name in self._trained:
            self._write_back(name)
        self.done.append(RecoveryStep(step + 1, loss / max(tokens, 1), float(norm)))

    def _batches(self, step: int) -> list[ExampleInputs]:
        """Those of one step: each time around in another order."""
        size, found = self._recovery.batches_per_step, []
        for place in range(step * size, (step + 1) * size):
            around, at = divmod(place, len(self._used))
            generator = torch.Generator().manual_seed(self._recovery.seed + around)
            order = torch.randperm(len(self._used), generator=generator)
            found.append(self._used[int(order[at])])
        return found

    @torch.no_grad()
    def _write_back(self, name: str) -> None:
        if self._copies[name] is not self._trained[name]:
            self._trained[name].copy_(self._copies[name])


class Checkpoint:
    """A file with a recovery that is under way.

    Args:
        path: of it.
        every: steps between two writes.
        settings: of the call, plain data: a file of other settings is refused.
    """

    def __init__(self, path: Path, every: int, settings: Mapping[str, Any]) -> None:
        self.path, self.every = path, every
        self._settings = json.loads(json.dumps(settings))

    def read(self) -> dict[str, Any] | None:
        """What is in the file; None where there is none.

        Raises:
            DistillationError: it is of another call; the settings that differ are named.
        """
        if not self.path.exists():
            return None
        found: dict[str, Any] = torch.load(self.path, weights_only=True)
        theirs = found["settings"]
        differ = [name for name in self._settings if theirs.get(name) != self._settings[name]]
        if differ:
            name = differ[0]
            raise DistillationError(
                f"{self.path}: is of another call: {name} was {theirs.get(name)!r}, now it is "
                f"{self._settings[name]!r}; call it as it was, or name another file"
            )
        return found

    def write(self, steps: RecoverySteps) -> None:
        """Put the steps into the file; whatever happens, there is a whole one."""
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"settings": self._settings, **steps.state_dict()}, unfinished)
        os.replace(unfinished, self.path)


def _float(parameter: nn.Parameter) -> Tensor:
    """What is optimized in its place."""
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_()


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)
