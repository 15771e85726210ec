"""One level over many tensors, without ever putting them together in memory.

Elements become integer keys that sort as they do, and the threshold is found digit by digit from
counts of the keys' digits. Counts add up, over tensors as over processes.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fx_sparsity.masks import native
from fx_sparsity.masks.engine import contains_nan
from fx_sparsity.masks.rank import Rank, ScoreError, check_floating

_DIGIT = 16  # bits
_CHUNK = 1 << 20  # elements that have keys at a time


@torch.no_grad()
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
    if not 0 <= level <= 1:
        raise ValueError(f"a sparsity level lies in [0, 1], found {level!r}")
    for tensor in tensors:
        check_floating(tensor)
    search = _Search([t.detach().contiguous() for t in tensors], rank, group)
    return search.masks(level)


class _Search:
    def __init__(self, tensors: list[Tensor], rank: Rank, group: dist.ProcessGroup | None) -> None:
        self.tensors, self.rank, self.group = tensors, rank, group
        self.device = tensors[0].device if tensors else torch.device("cpu")
        local = [
            sum(t.numel() for t in tensors),
            any(t.dtype == torch.float64 for t in tensors),
            contains_nan(*tensors),
        ]
        elements, wide, nan = self._sum(torch.tensor(local, device=self.device)).tolist()
        if nan:
            raise ScoreError("scores contain NaN")
        self.elements: int = elements
        self.bits = 64 if wide else 32
        # 64-bit keys are kept as signed integers, less by this.
        self.bias = 1 << 63 if wide else 0

    def masks(self, level: float) -> list[Tensor]:
        k = round(level * self.elements)
        key = equal = 0
        for shift in range(self.bits - _DIGIT, -1, -_DIGIT):
            local = self._count(key if shift + _DIGIT < self.bits else None, shift)
            ends = self._sum(local.clone()).cumsum(0)
            digit = int(torch.searchsorted(ends, max(k, 1)))
            digit = min(digit, len(ends) - 1)  # no elements at all
            k -= int(ends[digit - 1]) if digit else 0
            key = key << _DIGIT | digit
            equal = int(local[digit])
        ties = max(0, k - self._in_earlier_processes(equal))
        return list(self._drop(key, ties))

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

    def _count(self, prefix: int | None, shift: int) -> Tensor:
        """How often each digit at `shift` occurs in the keys that start with `prefix`."""
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=self.device)
        for tensor in self.tensors:
            if self.bits == 32 and native.covers(tensor):
                signed = self.rank is Rank.VALUE
                upper = -1 if prefix is None else prefix
                torch.ops.fx_sparsity_masks.count_keys(tensor, signed, upper, counts)
                continue
            for keys in self._keys(tensor):
                digits = (keys >> shift) & 0xFFFF
                if prefix is None:
                    digits ^= self.bias >> shift
                    weights = torch.ones_like(digits)
                else:
                    upper = prefix - (self.bias >> (shift + _DIGIT))
                    weights = (keys >> (shift + _DIGIT) == upper).long()
                counts.scatter_add_(0, digits, weights)
        return counts

    def _drop(self, key: int, ties: int) -> Iterator[Tensor]:
        """Drop all below `key`, and the first `ties` at it."""
        left = torch.tensor(ties, device=self.device)
        for tensor in self.tensors:
            mask = torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device)
            if self.bits == 32 and native.covers(tensor):
                signed = self.rank is Rank.VALUE
                left -= torch.ops.fx_sparsity_masks.drop_below(tensor, signed, key, int(left), mask)
            else:
                for keys, part in zip(self._keys(tensor), mask.view(-1).split(_CHUNK), strict=True):
                    equal = keys == key - self.bias
                    kept = equal & (equal.cumsum(0) > left)
                    torch.logical_or(keys > key - self.bias, kept, out=part)
                    left = (left - equal.sum()).clamp(min=0)
            yield mask

    def _keys(self, tensor: Tensor) -> Iterator[Tensor]:
        """Keys of a chunk at a time, as int64; those of 32 bits are the C++ operators' own."""
        wide = self.bits == 64
        for part in tensor.view(-1).split(_CHUNK):
            x = self.rank.scores(part.to(torch.float64 if wide else torch.float32))
            bits = (x + 0.0).view(torch.int64 if wide else torch.int32).long()  # no -0.0
            if self.rank is Rank.VALUE:
                largest = (1 << (self.bits - 1)) - 1
                bits = torch.where(bits < 0, bits ^ largest, bits)
                bits = bits if wide else bits + (1 << 31)
            yield bits
