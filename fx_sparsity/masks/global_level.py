"""One level over many tensors, without ever putting them together in memory.

Elements become integer keys that sort as they do, and the threshold is found digit by digit from
counts of the keys' digits. Counts add up, over tensors as over processes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fx_sparsity.masks import native
from fx_sparsity.masks.engine import contains_nan
from fx_sparsity.masks.rank import NAN, Rank, ScoreError, check_floating

_DIGIT = 16  # bits
_CHUNK = 1 << 20  # elements that have keys at a time


@dataclass(frozen=True)
class GlobalCut:
    """Where one level over many tensors cuts: what is needed to mask each of them by itself.

    Attributes:
        key: integer that sorts as the elements do; what lies below goes.
        bits: of the keys, 32 or 64.
        rank: how elements rank.
        ties: for each tensor, how many of its elements at the key go, the first ones.
    """

    key: int
    bits: int
    rank: Rank
    ties: tuple[int, ...]

    @torch.no_grad()
    def mask(self, index: int, tensor: Tensor) -> Tensor:
        """The mask of one of the tensors that were cut: boolean, contiguous, True is kept.

        Args:
            index: of the tensor among them.
            tensor: the same as then.
        """
        tensor, ties = tensor.detach().contiguous(), self.ties[index]
        mask = torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device)
        if self.bits == 32 and native.covers(tensor):
            signed = self.rank is Rank.VALUE
            torch.ops.fx_sparsity_masks.drop_below(tensor, signed, self.key, ties, mask)
            return mask
        left = torch.tensor(ties, device=tensor.device)
        key = self.key - _bias(self.bits)
        parts = mask.view(-1).split(_CHUNK)
        for keys, part in zip(_keys(tensor, self.rank, self.bits), parts, strict=True):
            equal = keys == key
            kept = equal & (equal.cumsum(0) > left)
            torch.logical_or(keys > key, kept, out=part)
            left = (left - equal.sum()).clamp(min=0)
        return mask


def global_masks(
    tensors: Sequence[Tensor],
    level: float,
    rank: Rank = Rank.VALUE,
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """Masks that together prune exactly `round(level * elements)` of the lowest ranks.

    Among equals go first those of the process of lowest rank, then of the first tensor, then first
    in row-major order.

    Args:
        tensors: scores, or weights where `rank` is a norm; floating, any shapes and dtypes, on one
            device. float64 among them makes the search twice as long.
        level: share of all elements to prune, in [0, 1].
        rank: how elements rank, see `compute_mask`.
        group: processes that each pass their part of the model; called by all of them.

    Returns:
        A contiguous boolean tensor for each of `tensors`: True is kept.

    Raises:
        ScoreError: a tensor holds a NaN (here or in another process) or is not floating.
        ValueError: a level outside [0, 1].
    """
    cut = global_cut(tensors, level, rank, group)
    return [cut.mask(i, tensor) for i, tensor in enumerate(tensors)]


@torch.no_grad()
def global_cut(
    tensors: Iterable[Tensor],
    level: float,
    rank: Rank = Rank.VALUE,
    group: dist.ProcessGroup | None = None,
) -> GlobalCut:
    """What `global_masks` does, without the masks: these can be made one by one.

    Args:
        tensors: as for `global_masks`; gone through several times, one at a time, so that they may
            be read anew each time.
        level: as for `global_masks`.
        rank: as for `global_masks`.
        group: as for `global_masks`.

    Raises:
        ScoreError, ValueError: as `global_masks`.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"a sparsity level lies in [0, 1], found {level!r}")
    return _Search(tensors, rank, group).cut(level)


class _Search:
    def __init__(
        self, tensors: Iterable[Tensor], rank: Rank, group: dist.ProcessGroup | None
    ) -> None:
        self.tensors, self.rank, self.group = tensors, rank, group
        self.device = torch.device("cpu")
        elements, wide, nan = 0, False, False
        for tensor in tensors:
            check_floating(tensor)
            self.device = tensor.device
            elements += tensor.numel()
            wide |= tensor.dtype == torch.float64
            nan = nan or contains_nan(tensor.detach().contiguous())
        found = torch.tensor([elements, wide, nan], device=self.device)
        elements, wide, nan = self._sum(found).tolist()
        if nan:
            raise ScoreError(NAN)
        self.elements: int = elements
        self.bits = 64 if wide else 32

    def cut(self, level: float) -> GlobalCut:
        k = round(level * self.elements)
        key = 0
        here: list[tuple[Tensor, Tensor]] = []
        for shift in range(self.bits - _DIGIT, -1, -_DIGIT):
            counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=self.device)
            here = []  # of each tensor: the digits that occur, and how often
            for tensor in self.tensors:
                own = self._count(tensor, key if shift + _DIGIT < self.bits else None, shift)
                counts += own
                if shift == 0:
                    digits = own.nonzero().squeeze(1)
                    here.append((digits, own[digits]))
            ends = self._sum(counts.clone()).cumsum(0)
            digit = int(torch.searchsorted(ends, max(k, 1)))
            digit = min(digit, len(ends) - 1)  # no elements at all
            k -= int(ends[digit - 1]) if digit else 0
            key = key << _DIGIT | digit
        equal = [int(count[digits == digit].sum()) for digits, count in here]
        left = max(0, k - self._in_earlier_processes(sum(equal)))
        ties = []
        for count in equal:
            ties.append(min(left, count))
            left -= ties[-1]
        return GlobalCut(key, self.bits, self.rank, tuple(ties))

    def _sum(self, counts: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        return counts

    def _in_earlier_processes(self, equal: int) -> int:
        if self.group is None:
            return 0
        own = torch.tensor([equal], device=self.device)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own, group=self.group)
        return sum(int(part) for part in parts[: dist.get_rank(self.group)])

    def _count(self, tensor: Tensor, prefix: int | None, shift: int) -> Tensor:
        """How often each digit at `shift` occurs in the keys that start with `prefix`."""
        tensor = tensor.detach().contiguous()
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=self.device)
        if self.bits == 32 and native.covers(tensor):
            signed = self.rank is Rank.VALUE
            upper = -1 if prefix is None else prefix
            torch.ops.fx_sparsity_masks.count_keys(tensor, signed, upper, counts)
            return counts
        bias = _bias(self.bits)
        for keys in _keys(tensor, self.rank, self.bits):
            digits = (keys >> shift) & 0xFFFF
            if prefix is None:
                digits ^= bias >> shift
                weights = torch.ones_like(digits)
            else:
                upper = prefix - (bias >> (shift + _DIGIT))
                weights = (keys >> (shift + _DIGIT) == upper).long()
            counts.scatter_add_(0, digits, weights)
        return counts


def _bias(bits: int) -> int:
    """64-bit keys are kept as signed integers, less by this."""
    return 1 << 63 if bits == 64 else 0


def _keys(tensor: Tensor, rank: Rank, bits: int) -> Iterator[Tensor]:
    """Keys of a chunk at a time, as int64; those of 32 bits are the C++ operators' own."""
    wide = bits == 64
    for part in tensor.view(-1).split(_CHUNK):
        x = rank.scores(part.to(torch.float64 if wide else torch.float32))
        found = (x + 0.0).view(torch.int64 if wide else torch.int32).long()  # no -0.0
        if rank is Rank.VALUE:
            largest = (1 << (bits - 1)) - 1
            found = torch.where(found < 0, found ^ largest, found)
            found = found if wide else found + (1 << 31)
        yield found
