"""`Sparsify` in `transformers.Trainer`; needs transformers 5."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.sparsifier import BaseScheduler
from fx_sparsity.sparsifier.mask_state import load_entry
from fx_sparsity.training.method import TrainingMethod
from fx_sparsity.training.scalars import MaskScalars
from fx_sparsity.training.sparsify import Sparsify

STATE = "sparsify.pt"
"""Name of the file in a trainer's checkpoint with the state of method and schedule."""
_log = logging.getLogger(__name__)


class ResumeError(FxSparsityError, RuntimeError):
    """A trainer goes on in mid-training, and the state of the masks is not there, or another's."""


class SparsifyCallback(TrainerCallback):
    """Has a method take part in the steps of a `Trainer`, see `Sparsify`.

    Prepare the model with the method before the trainer is made. Every checkpoint holds the state
    of method and schedule in `sparsify.pt`, and `train(resume_from_checkpoint=...)` goes on exactly
    where it was. Density, threshold and churn of the masks are in the trainer's logs; other
    callbacks that report them, such as TensorBoard's, come before this one unless `attach` puts it
    in front.

    Args:
        method: has prepared the trainer's model.
        schedule: of the method's levels; None leaves them as they are configured.
        resume_from: the checkpoint that `train` resumes from, where that is neither the trainer's
            `args.resume_from_checkpoint` nor in its own output folder.

    Attributes:
        run: the `Sparsify` of the training that is under way; None before the first.
    """

    def __init__(
        self,
        method: TrainingMethod,
        schedule: BaseScheduler | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        self.method, self.schedule, self.resume_from = method, schedule, resume_from
        self.run: Sparsify | None = None
        self._scalars = MaskScalars(method)

    def attach(self, trainer: Any) -> "SparsifyCallback":
        """Make it the first callback of a trainer, so that every other sees the masks' numbers.

        Args:
            trainer: with or without this callback.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hang on the optimizer; in mid-training, load what was saved.

        Raises:
            MaskError, ValueError: see `Sparsify`.
            ResumeError: the state of the masks is not in the checkpoint, or it has other masks than
                the model that was loaded.
        """
        del control
        saved = self._saved(args, state.global_step) if state.global_step else None
        if saved is not None:  # first of all: a method that begins would move masks, and momenta
            self.method.load_state_dict(saved["method"])
        self.run = Sparsify(
            kwargs["model"], self.method, kwargs["optimizer"], self.schedule, state.max_steps
        )
        if saved is not None:
            self.run.load_state_dict(saved)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state of method and schedule into the checkpoint."""
        del control, kwargs
        if self.run is not None and state.is_world_process_zero:
            torch.save(self.run.state_dict(), _folder(args, state.global_step) / STATE)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the masks' numbers among those that are logged in training."""
        del args, control
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs:
            numbers = self._scalars.read()
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the optimizer go; the masks stay on until `squash`.

        The method follows the model to the best checkpoint, if `load_best_model_at_end`. It warns
        where that one has lower levels than the masks of the end, as in the middle of a schedule.
        """
        del control, kwargs
        if self.run is None:
            return
        self.run.remove()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._follow(Path(state.best_model_checkpoint))

    def _follow(self, folder: Path) -> None:
        saved = _read(folder)
        if self.run is None or saved is None or self._differ(saved):
            return  # the trainer has not loaded it, and says so
        levels = self._levels()
        self.run.load_state_dict(saved)
        lower = [name for name, level in self._levels().items() if level < levels[name] - 1e-9]
        if lower:
            _log.warning(
                "the best model is that of step %d, from before the masks were done: %s is at "
                "level %.3g, at the end it was at %.3g; to choose among those at the end of the "
                "schedule, load one of its checkpoints",
                *(self.method.trained, lower[0], self._levels()[lower[0]], levels[lower[0]]),
            )

    def _levels(self) -> dict[str, float]:
        asked = {name: self.method.asked_of(name) for name in self.method.names}
        return {name: found[1] for name, found in asked.items() if found is not None}

    def _differ(self, saved: dict[str, Any]) -> str | None:
        """The first weight whose mask in the model is not the one that was saved."""
        for name, entry in saved["method"]["state"].items():
            mask, *_ = load_entry(entry)
            if mask is None or name not in self.method.names:
                continue  # which `load_state_dict` tells
            if not torch.equal(mask != 0, self.method.keep(name).cpu()):
                return name
        return None

    def _saved(self, args: Any, step: int) -> dict[str, Any]:
        given = self.resume_from or getattr(args, "resume_from_checkpoint", None)
        folder = Path(given) if isinstance(given, str | Path) else _folder(args, step)
        if (saved := _read(folder)) is None:
            raise ResumeError(
                f"training goes on after step {step}, but {folder} has no {STATE} with the state "
                "of the masks; say with resume_from= where the checkpoint is"
            )
        if (name := self._differ(saved)) is not None:
            raise ResumeError(
                f"{folder} has another mask of {name} than the model that training goes on with, "
                "which is of another checkpoint; say with resume_from= where that is"
            )
        return saved


def _read(folder: Path) -> dict[str, Any] | None:
    if not (folder / STATE).exists():
        return None
    saved: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return saved


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir, f"checkpoint-{step}")
