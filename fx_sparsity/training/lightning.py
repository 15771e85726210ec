"""`Sparsify` in Lightning; needs the package `lightning` or `pytorch_lightning`."""

import importlib.util
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fx_sparsity.sparsifier import BaseScheduler
from fx_sparsity.training.method import TrainingMethod
from fx_sparsity.training.scalars import MaskScalars
from fx_sparsity.training.sparsify import Sparsify

if TYPE_CHECKING:
    Callback: Any = object
elif importlib.util.find_spec("lightning") is not None:
    from lightning.pytorch import Callback
else:
    from pytorch_lightning import Callback


class SparsifyCallback(Callback):
    """Has a method take part in the steps of a Lightning `Trainer`, see `Sparsify`.

    Prepare the module with the method before `fit`. Checkpoints hold the state of method and
    schedule, and `fit(ckpt_path=...)` goes on exactly where it was. Density, threshold and churn of
    the masks go to the trainer's loggers, every `log_every_n_steps`.

    Args:
        method: has prepared the module, or a part of it.
        schedule: of the method's levels; None leaves them as they are configured.

    Attributes:
        run: the `Sparsify` of the fit that is under way; None before the first.
    """

    def __init__(self, method: TrainingMethod, schedule: BaseScheduler | None = None) -> None:
        super().__init__()
        self.method, self.schedule = method, schedule
        self.run: Sparsify | None = None
        self._scalars = MaskScalars(method)
        self._saved: Mapping[str, Any] | None = None
        self._logged = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Hang on the optimizer that trains the masked weights; load what was saved.

        Raises:
            MaskError, ValueError: see `Sparsify`.
        """
        if self._saved is not None:  # first of all: a method that begins would move masks
            self.method.load_state_dict(self._saved["method"])
        steps = trainer.estimated_stepping_batches
        self.run = Sparsify(
            pl_module,
            self.method,
            self._optimizer(trainer),
            self.schedule,
            None if math.isinf(steps) else int(steps),
        )
        if self._saved is not None:
            self.run.load_state_dict(self._saved)
            self._saved = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Look at the gradients before they are clipped."""
        del trainer, pl_module
        if self.run is not None and optimizer is self.run.optimizer:
            self.run.after_backward()

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Give the loggers the masks' numbers, once for all batches of a step."""
        del args, kwargs
        step = trainer.global_step
        if not trainer.loggers or step == self._logged or step % trainer.log_every_n_steps:
            return
        self._logged = step
        numbers = self._scalars.read()
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let the optimizer go; the masks stay on until `squash`."""
        del trainer, pl_module
        if self.run is not None:
            self.run.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {} if self.run is None else self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint held until training starts."""
        self._saved = state_dict or None

    def _optimizer(self, trainer: Any) -> Any:
        wanted = {id(weight) for weight in self.method.live().values()}
        for optimizer in trainer.optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if held & wanted:
                return optimizer
        return trainer.optimizers[0]  # `Sparsify` names the weight that nobody trains
