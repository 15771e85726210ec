"""`Sparsify` in `transformers.Trainer`; needs transformers 5."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.sparsifier import BaseScheduler
from fx_sparsity.training.method import TrainingMethod
from fx_sparsity.training.scalars import MaskScalars
from fx_sparsity.training.sparsify import Sparsify

STATE = "sparsify.pt"
"""Name of the file in a trainer's checkpoint with the state of method and schedule."""


class ResumeError(FxSparsityError, RuntimeError):
    """A trainer goes on in mid-training, and the state of the masks is not there."""


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
            ResumeError: the state of the masks is not in the checkpoint.
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
        """Let the optimizer go; the masks stay on until `squash`."""
        del args, state, control, kwargs
        if self.run is not None:
            self.run.remove()

    def _saved(self, args: Any, step: int) -> dict[str, Any]:
        given = self.resume_from or getattr(args, "resume_from_checkpoint", None)
        folder = Path(given) if isinstance(given, str | Path) else _folder(args, step)
        if not (folder / STATE).exists():
            raise ResumeError(
                f"training goes on after step {step}, but {folder} has no {STATE} with the state "
                "of the masks; say with resume_from= where the checkpoint is"
            )
        saved: dict[str, Any] = torch.load(folder / STATE, weights_only=True)
        return saved


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir, f"checkpoint-{step}")
