"""Schedules: how a sparsity level, or any value of a configuration, moves from step to step."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fx_sparsity.sparsifier.core import SparsifierCore


class _Scheduler(ABC):
    """Writes one value of every configuration of a sparsifier, at every `step`.

    Works on model-bound and on data sparsifiers alike: both name their tensors and their configs.
    """

    def __init__(
        self, sparsifier: SparsifierCore, param: str, last_epoch: int, verbose: bool
    ) -> None:
        if not isinstance(sparsifier, SparsifierCore):
            raise TypeError(f"sparsifier: expected a sparsifier, found {type(sparsifier).__name__}")
        self._sparsifier = sparsifier
        self._param = param
        self.last_epoch = last_epoch
        self.verbose = verbose
        self._step_count = 0
        self._sparsifier_steps = sparsifier.steps
        self._within_step = False
        self._last_param: dict[str, Any] = {}
        self.step()

    @abstractmethod
    def _values(self) -> Mapping[str, Any]:
        """Name -> value at `last_epoch`."""

    @abstractmethod
    def _print(self, epoch: int | None) -> None:
        """Say what the last step wrote."""

    def step(self, epoch: int | None = None) -> None:
        """Go on by one epoch and write the new values. Call it after the sparsifier's `step`.

        Args:
            epoch: for what is printed; the schedule counts its own.
        """
        if self._step_count == 1 and self._sparsifier.steps == self._sparsifier_steps:
            warnings.warn(
                "`scheduler.step()` was called before `sparsifier.step()`; the first value of the "
                "schedule was never used. Call `sparsifier.step()` first",
                stacklevel=2,
            )
        self._step_count += 1
        self.last_epoch += 1
        self._within_step = True
        try:
            self._last_param = dict(self._values())
        finally:
            self._within_step = False
        self._write()
        self._print(epoch)
        self._sparsifier.enable_mask_update = True

    def values_at(self, epoch: int) -> dict[str, Any]:
        """Name -> value at an epoch, without going there: nothing is written."""
        held = self.last_epoch
        self.last_epoch, self._within_step = epoch, True
        try:
            return dict(self._values())
        finally:
            self.last_epoch, self._within_step = held, False

    def state_dict(self) -> dict[str, Any]:
        """Everything but the sparsifier and functions, which have to be given again."""
        return {
            key: value
            for key, value in self.__dict__.items()
            if not isinstance(value, SparsifierCore) and key != "sl_lambdas"
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` saved.

        Raises:
            ValueError: a key that this scheduler does not have; nothing was changed.
        """
        unknown = sorted(set(state_dict) - set(self.__dict__))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no {', '.join(unknown)}")
        self.__dict__.update(state_dict)
        self._write()

    def _write(self) -> None:
        for name, value in self._last_param.items():
            self._sparsifier.config_of(name)[self._param] = value

    def _warn_outside_step(self, instead: str) -> None:
        if not self._within_step:
            warnings.warn(f"to get the last value, call `{instead}`", stacklevel=3)

    def _base(self) -> dict[str, Any]:
        sparsifier = self._sparsifier
        return {name: sparsifier.config_of(name).get(self._param) for name in sparsifier.names}


class BaseScheduler(_Scheduler):
    """Base class of schedules of the sparsity level. Override `get_sl`.

    Args:
        sparsifier: model-bound or data sparsifier whose configurations have a `sparsity_level`.
        last_epoch: epoch to resume from; -1 starts anew.
        verbose: print every change.

    Attributes:
        base_sl: the levels that the configurations had at the start, in the sparsifier's order.
    """

    def __init__(
        self, sparsifier: SparsifierCore, last_epoch: int = -1, verbose: bool = False
    ) -> None:
        self.sparsifier = sparsifier
        if isinstance(sparsifier, SparsifierCore):
            for name in sparsifier.names:
                found = sparsifier.pattern_of(sparsifier.config_of(name))
                if found is not None and found[0].implied_level is not None:
                    raise ValueError(
                        f"{name}: pattern {found[0]} fixes its level, which cannot be scheduled"
                    )
            self.base_sl = [sparsifier.config_of(n)["sparsity_level"] for n in sparsifier.names]
        super().__init__(sparsifier, "sparsity_level", last_epoch, verbose)

    @abstractmethod
    def get_sl(self) -> Sequence[float]:
        """Levels at `last_epoch`, in the sparsifier's order. Called by `step`."""

    def get_last_sl(self) -> list[float]:
        """Levels that the last `step` wrote."""
        return list(self._last_param.values())

    def print_sl(self, is_verbose: bool, group: int, sl: float, epoch: int | None = None) -> None:
        """Print a level. Called by `step` for every tensor.

        Args:
            is_verbose: nothing is printed otherwise.
            group: place of the tensor in the sparsifier's order.
            sl: the level.
            epoch: what `step` was given.
        """
        if is_verbose:
            when = "A" if epoch is None else f"Epoch {epoch:5d}: a"
            print(f"{when}djusting sparsity level of group {group} to {sl:.4e}.")

    def _print(self, epoch: int | None) -> None:
        for group, level in enumerate(self.get_last_sl()):
            self.print_sl(self.verbose, group, level, epoch)

    def _values(self) -> Mapping[str, float]:
        names, levels = self._sparsifier.names, list(self.get_sl())
        if len(names) != len(levels):
            raise ValueError(
                f"the schedule has {len(levels)} levels, the sparsifier {len(names)} tensors; "
                "make a new scheduler after adding or removing tensors"
            )
        return dict(zip(names, levels, strict=True))

    def _make_sure_a_list(self, value: Any) -> list[Any]:
        """One value for each tensor.

        Raises:
            ValueError: a list of another length.
        """
        count = len(self.sparsifier.names)
        if not isinstance(value, list | tuple):
            return [value] * count
        if len(value) != count:
            raise ValueError(f"expected a list of length {count}, found {len(value)}")
        return list(value)


class LambdaSL(BaseScheduler):
    """Level = base level x a function of the epoch.

    Args:
        sparsifier: see `BaseScheduler`.
        sl_lambda: epoch -> factor; or a list of such functions, one for each tensor.
        last_epoch: epoch to resume from.
        verbose: print every change.

    Raises:
        ValueError: a list of another length than the sparsifier's tensors.
    """

    def __init__(
        self,
        sparsifier: SparsifierCore,
        sl_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.sparsifier = sparsifier
        self.sl_lambdas = self._make_sure_a_list(sl_lambda)
        super().__init__(sparsifier, last_epoch, verbose)

    def get_sl(self) -> list[float]:
        """See `BaseScheduler.get_sl`."""
        self._warn_outside_step("get_last_sl()")
        factors = [function(self.last_epoch) for function in self.sl_lambdas]
        return [level * factor for level, factor in zip(self.base_sl, factors, strict=True)]


class CubicSL(BaseScheduler):
    """Fast at first, slow at the end: Zhu and Gupta, arXiv 1710.01878, equation 1.

    `s_t = s_f + (s_0 - s_f) * (1 - (t - t_0) / (n * dt)) ** 3`, kept between s_0 and s_f, where s_f
    is the level that the configuration has at the start. Every argument may be a list, one value
    for each tensor.

    Args:
        sparsifier: see `BaseScheduler`.
        init_sl: s_0.
        init_t: t_0, the epoch when pruning starts.
        delta_t: dt, epochs between updates.
        total_t: n, number of updates.
        initially_zero: level 0 before t_0, instead of s_0.
        last_epoch: epoch to resume from.
        verbose: print every change.

    Raises:
        ValueError: a list of another length than the sparsifier's tensors.
    """

    def __init__(
        self,
        sparsifier: SparsifierCore,
        init_sl: float | Sequence[float] = 0.0,
        init_t: int | Sequence[int] = 0,
        delta_t: int | Sequence[int] = 10,
        total_t: int | Sequence[int] = 100,
        initially_zero: bool | Sequence[bool] = False,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.sparsifier = sparsifier
        self.init_sl = self._make_sure_a_list(init_sl)
        self.init_t = self._make_sure_a_list(init_t)
        self.delta_t = self._make_sure_a_list(delta_t)
        self.total_t = self._make_sure_a_list(total_t)
        self.initially_zero = self._make_sure_a_list(initially_zero)
        super().__init__(sparsifier, last_epoch, verbose)

    @staticmethod
    def sparsity_compute_fn(
        s_0: float, s_f: float, t: int, t_0: int, dt: int, n: int, initially_zero: bool = False
    ) -> float:
        """The level at epoch `t`; the names are those of the paper."""
        if initially_zero and t < t_0:
            return 0
        level = s_f + (s_0 - s_f) * (1 - (t - t_0) / (dt * n)) ** 3
        return max(s_0, min(s_f, level))

    def get_sl(self) -> list[float]:
        """See `BaseScheduler.get_sl`."""
        self._warn_outside_step("get_last_sl()")
        return [
            self.sparsity_compute_fn(s_0, s_f, self.last_epoch, t_0, dt, n, zero)
            for s_0, s_f, t_0, dt, n, zero in zip(
                self.init_sl,
                self.base_sl,
                self.init_t,
                self.delta_t,
                self.total_t,
                self.initially_zero,
                strict=True,
            )
        ]


class BaseDataScheduler(_Scheduler):
    """Base class of schedules of any value of a configuration, by name.

    Override `get_schedule_param`.

    Args:
        data_sparsifier: data or model-bound sparsifier.
        schedule_param: key of the configurations to move.
        last_epoch: epoch to resume from; -1 starts anew.
        verbose: print every change.

    Attributes:
        base_param: name -> value that the configuration had at the start.
    """

    def __init__(
        self,
        data_sparsifier: SparsifierCore,
        schedule_param: str,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.data_sparsifier = data_sparsifier
        self.schedule_param = schedule_param
        self._sparsifier, self._param = data_sparsifier, schedule_param
        if isinstance(data_sparsifier, SparsifierCore):
            self.base_param = self._base()
        super().__init__(data_sparsifier, schedule_param, last_epoch, verbose)

    @abstractmethod
    def get_schedule_param(self) -> Mapping[str, Any]:
        """Name -> value at `last_epoch`. Called by `step`."""

    def get_last_param(self) -> dict[str, Any]:
        """Values that the last `step` wrote, by name."""
        return dict(self._last_param)

    def _values(self) -> Mapping[str, Any]:
        return self.get_schedule_param()

    def _print(self, epoch: int | None) -> None:
        if self.verbose:
            for name, value in self._last_param.items():
                print(f"Adjusting {self._param} for group {name} to {value}")
