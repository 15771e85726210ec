"""The Lightning callbacks of `torch.ao.pruning` under their names; needs Lightning.

They sparsify copies of a module's parameters: `module.model` is trained as it is, and what it would
be with masks is the callback's `sparsified`. For masks that take part in training there is
`fx_sparsity.training.lightning.SparsifyCallback`.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from fx_sparsity.sparsifier import BaseDataScheduler, BaseDataSparsifier

if TYPE_CHECKING:
    Callback: Any = object
elif importlib.util.find_spec("lightning") is not None:
    from lightning.pytorch import Callback
else:
    from pytorch_lightning import Callback

_log = logging.getLogger(__name__)


class PostTrainingDataSparsity(Callback):
    """Sparsifies a copy of `module.model` when fitting ends.

    Args:
        data_sparsifier_class: made when it is needed.
        data_sparsifier_args: keyword arguments of the class.

    Attributes:
        data_sparsifier: holds every parameter under its FQN with underscores for dots.
        sparsified: the copy, in eval mode, its zeros baked in; None before.
    """

    def __init__(
        self,
        data_sparsifier_class: type[BaseDataSparsifier],
        data_sparsifier_args: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.data_sparsifier_class = data_sparsifier_class
        self.data_sparsifier_args = data_sparsifier_args
        self.data_sparsifier: BaseDataSparsifier | None = None
        self.sparsified: nn.Module | None = None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Copy, step and squash."""
        del trainer
        self.sparsified = copy.deepcopy(pl_module.model).eval()
        self.data_sparsifier = self.data_sparsifier_class(**self.data_sparsifier_args)
        _attach(self.sparsified, self.data_sparsifier)
        self.data_sparsifier.step()
        self.data_sparsifier.squash_mask()
        for name in self.data_sparsifier.names:
            level = 1 - float(self.data_sparsifier.get_mask(name).float().mean())
            _log.info("sparsity of %s: %.2f%%", name, 100 * level)


class TrainingAwareDataSparsity(Callback):
    """Sparsifies a copy of `module.model` at the end of every epoch, by a schedule.

    Args:
        data_sparsifier_class: made when training starts.
        data_sparsifier_args: keyword arguments of the class.
        data_scheduler_class: made then, too.
        data_scheduler_args: its keyword arguments but for `data_sparsifier`.

    Attributes:
        data_sparsifier: see `PostTrainingDataSparsity`.
        data_scheduler: moves its levels, once an epoch.
        data_sparsifier_state_dict: its state after the last epoch.
        sparsified: the last copy; its zeros are baked in when training ends.
    """

    def __init__(
        self,
        data_sparsifier_class: type[BaseDataSparsifier],
        data_sparsifier_args: Mapping[str, Any],
        data_scheduler_class: type[BaseDataScheduler],
        data_scheduler_args: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.data_sparsifier_class = data_sparsifier_class
        self.data_sparsifier_args = data_sparsifier_args
        self.data_scheduler_class = data_scheduler_class
        self.data_scheduler_args = data_scheduler_args
        self.data_sparsifier: BaseDataSparsifier | None = None
        self.data_scheduler: BaseDataScheduler | None = None
        self.data_sparsifier_state_dict: dict[str, Any] | None = None
        self.sparsified: nn.Module | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make sparsifier and scheduler."""
        del trainer
        self.data_sparsifier = self.data_sparsifier_class(**self.data_sparsifier_args)
        self.sparsified = copy.deepcopy(pl_module.model)
        _attach(self.sparsified, self.data_sparsifier)
        arguments = {**copy.deepcopy(dict(self.data_scheduler_args))}
        arguments["data_sparsifier"] = self.data_sparsifier
        self.data_scheduler = self.data_scheduler_class(**arguments)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Copy the model as it is now, with the masks and levels so far, and step."""
        del trainer
        if self.data_sparsifier is None or self.data_scheduler is None:
            raise RuntimeError("on_train_start was not called")
        self.sparsified = copy.deepcopy(pl_module.model)
        _attach(self.sparsified, self.data_sparsifier)
        self.data_sparsifier.step()
        self.data_scheduler.step()
        self.data_sparsifier_state_dict = self.data_sparsifier.state_dict()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Bake the zeros in."""
        del trainer, pl_module
        if self.data_sparsifier is not None:
            self.data_sparsifier.squash_mask()


def _attach(model: nn.Module, sparsifier: BaseDataSparsifier) -> None:
    """Have a sparsifier hold a model's parameters, in the place of those of the copy before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="replacing existing data")
        for name, parameter in model.named_parameters():
            sparsifier.add_data(name.replace(".", "_"), parameter)
