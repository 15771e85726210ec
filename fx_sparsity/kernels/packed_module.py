"""What modules with packed weights share: they stay safe to read, and lie in large pages."""

import copy
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from fx_sparsity.kernels.pages import use_large_pages


class PackedModule(nn.Module):
    """A module whose buffers are read by kernels that do not look whether they make sense.

    They are checked when the module is unpickled, and put into large pages whenever they lie in new
    memory. Subclasses check what they are built from and what a state dict brings, and call
    `_settle` after that.
    """

    def check(self) -> None:
        """Raise PackingError, naming what is corrupt, unless a kernel can read the buffers safely.

        Modules on the meta device hold nothing to check.
        """
        raise NotImplementedError

    def _settle(self) -> None:
        """To be called whenever buffers lie in new memory."""
        use_large_pages(*self._buffers.values())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.check()
        self._settle()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Not through __setstate__: what is copied in memory was checked.
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied._settle()
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._settle()
        return self
