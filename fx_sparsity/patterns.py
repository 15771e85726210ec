"""Which zeros are legal: sparsity patterns, the roles of a weight's axes, and configurations.

A pattern speaks of *roles* ("2:4 along `in`"), so that one pattern fits a `Linear` ([out, in]), a
`Conv2d` ([out, in, kernel, kernel]), a transposed storage ([in, out]) and experts
([batch, in, out]) alike. `Pattern.tiling` translates it, once, into a `Tiling`: extents per
storage dimension, which is all that the mask engine understands.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from fx_sparsity.errors import FxSparsityError

Role = Literal["out", "in", "row", "dim", "kernel", "batch"]
Remainder = Literal["error", "dense", "pad"]

ROLES: tuple[Role, ...] = get_args(Role)
OUTPUT_ROLES: frozenset[Role] = frozenset({"out", "row"})
"""Roles whose index selects a whole result: an output channel or a looked-up row."""
INPUT_ROLES: frozenset[Role] = frozenset({"in", "dim"})
"""Roles whose axis is reduced by the operator, or runs along the looked-up vector."""


class PatternError(FxSparsityError, ValueError):
    """A pattern cannot be parsed, or cannot fit the weight that it was asked to fit."""


@dataclass(frozen=True)
class Tiling:
    """A pattern in storage dimensions: the one form that the mask engine computes.

    The weight is cut into blocks of `extents` elements (one extent per dimension). `round(level *
    blocks)` of them are chosen, lowest mean score first, and from each chosen block go:

    - `zeros="all"`: every element (block sparsity; unstructured where every extent is 1);
    - an integer: that many, lowest score first, or all of a ragged block that has no more (the
      classic `zeros_per_block`);
    - `zeros="level"`: here every block is chosen, and loses `round(level * elements)` of its own
      elements (N:M, and unstructured per output row).

    `remainder` rules axes that an extent does not divide: `"pad"` makes the ragged edge a block of
    the elements it really has, the missing ones counted among its zeros where `zeros` is
    `"level"`; `"dense"` never prunes the edge; `"error"` refuses the weight.
    """

    extents: tuple[int, ...]
    zeros: int | Literal["all", "level"] = "all"
    remainder: Remainder = "error"

    @property
    def block_size(self) -> int:
        """Elements in a whole block."""
        return math.prod(self.extents)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Number of blocks along each dimension of a weight of this `shape`."""
        if self.remainder == "dense":
            return tuple(s // e for s, e in zip(shape, self.extents, strict=True))
        return tuple(-(-s // e) for s, e in zip(shape, self.extents, strict=True))

    def zeros_in_chosen(self, level: float, real: Tensor) -> Tensor:
        """Zeros that chosen blocks have, each of which has `real` elements inside the weight."""
        if self.zeros == "all":
            return real
        if self.zeros == "level":
            return (round(level * self.block_size) - (self.block_size - real)).clamp(min=0)
        return real.clamp(max=self.zeros)

    def chosen(self, level: float, blocks: int) -> int:
        """How many of `blocks` are chosen."""
        return blocks if self.zeros == "level" else round(level * blocks)

    def check(self, shape: Sequence[int], pattern: object) -> None:
        """Raise `PatternError` if blocks do not fit `shape` and the remainder policy forbids it."""
        if len(self.extents) != len(shape):
            raise PatternError(
                f"pattern {pattern} has {len(self.extents)} dimensions, "
                f"the weight has shape {tuple(shape)}"
            )
        if self.remainder != "error":
            return
        for dim, (size, extent) in enumerate(zip(shape, self.extents, strict=True)):
            if size % extent:
                raise PatternError(
                    f"pattern {pattern} needs dimension {dim} to be a multiple of {extent}, "
                    f"found {size} in shape {tuple(shape)}; exclude the weight, or choose a "
                    f'remainder policy: remainder="dense" keeps the edge, "pad" prunes it too'
                )


class Pattern(ABC):
    """Which zeros are legal. Immutable; see the subclasses, and `Pattern.parse` for strings."""

    @abstractmethod
    def tiling(self, shape: Sequence[int], roles: Sequence[Role]) -> Tiling:
        """This pattern for a weight of `shape` whose dimensions have these `roles`.

        Raises:
            PatternError: the pattern cannot fit; says which dimension, expected and found.
        """

    @property
    def implied_level(self) -> float | None:
        """The level that the pattern itself fixes (2:4 is one half), else None."""
        return None

    @staticmethod
    def parse(text: "str | Pattern") -> "Pattern":
        """Read a pattern from a string.

        `"unstructured"`, `"unstructured:out"` (ranked per output row), `"2:4"`, `"block:32x32"`,
        `"block:1x4:2"` (two zeros in every chosen block), `"rows"`, `"channels"`. N:M and blocks
        take a remainder policy: `"2:4 dense"`, `"block:4x4 pad"`. `str(pattern)` is read back.

        Raises:
            PatternError: for anything else, quoting it.
        """
        if isinstance(text, Pattern):
            return text
        name, _, remainder = text.strip().lower().partition(" ")
        policy: dict[str, Remainder] = {"": "error", "dense": "dense", "pad": "pad"}
        if remainder in policy:
            if match := re.fullmatch(r"(\d+):(\d+)", name):
                return NM(int(match[1]), int(match[2]), policy[remainder])
            if match := re.fullmatch(r"(storage-)?block:(\d+)x(\d+)(?::(\d+))?", name):
                shape = (int(match[2]), int(match[3]))
                zeros = int(match[4]) if match[4] else None
                if not match[1]:
                    return Block(shape, zeros, policy[remainder])
                if not remainder:
                    return StorageBlock(shape, zeros)
            if name in _NAMED and not remainder:
                return _NAMED[name]
        raise PatternError(
            f"unknown pattern {text!r}; expected one of {', '.join(map(repr, _NAMED))}, "
            '"N:M" such as "2:4", or "block:HxW" such as "block:32x32"'
        )


def _single(roles: Sequence[Role], wanted: frozenset[Role], pattern: object) -> int:
    """The one dimension whose role is in `wanted`."""
    dims = [dim for dim, role in enumerate(roles) if role in wanted]
    if len(dims) != 1:
        raise PatternError(
            f"pattern {pattern} needs exactly one dimension of role {' or '.join(sorted(wanted))}, "
            f"found roles {list(roles)}"
        )
    return dims[0]


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any element may go. `per="out"` ranks within each output row (Wanda, arXiv 2306.11695)."""

    per: Literal["tensor", "out"] = "tensor"

    def tiling(self, shape: Sequence[int], roles: Sequence[Role]) -> Tiling:
        """See `Pattern.tiling`. An output row spans every `in`, `dim` and `kernel` axis."""
        if self.per == "tensor":
            return Tiling((1,) * len(shape))
        inner = INPUT_ROLES | {"kernel"}
        extents = tuple(
            size if role in inner else 1 for size, role in zip(shape, roles, strict=True)
        )
        return Tiling(extents, zeros="level")

    def __str__(self) -> str:
        return "unstructured" if self.per == "tensor" else "unstructured:out"


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` kept of every `m` neighbours along the reduced axis; `NM(2, 4)` is 2:4."""

    n: int
    m: int
    remainder: Remainder = "error"

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= 32:
            raise PatternError(f"N:M needs 0 < N < M <= 32, found {self.n}:{self.m}")

    @property
    def implied_level(self) -> float:
        """`1 - n / m`."""
        return 1 - self.n / self.m

    def tiling(self, shape: Sequence[int], roles: Sequence[Role]) -> Tiling:
        """See `Pattern.tiling`. Groups run along the axis of role `in` (or `dim`)."""
        dim = _single(roles, INPUT_ROLES, self)
        extents = tuple(self.m if d == dim else 1 for d in range(len(shape)))
        tiling = Tiling(extents, zeros="level", remainder=self.remainder)
        tiling.check(shape, self)
        return tiling

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{_policy_text(self.remainder)}"


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `shape` = (along `out` or `row`, along `in` or `dim`) elements.

    With `zeros_per_block` only that many elements of each chosen block go; otherwise all do.
    """

    shape: tuple[int, int]
    zeros_per_block: int | None = None
    remainder: Remainder = "error"

    def __post_init__(self) -> None:
        _check_block(self.shape, self.zeros_per_block)

    def tiling(self, shape: Sequence[int], roles: Sequence[Role]) -> Tiling:
        """See `Pattern.tiling`. Batch and kernel positions are blocked independently."""
        extents = [1] * len(shape)
        extents[_single(roles, OUTPUT_ROLES, self)] = self.shape[0]
        extents[_single(roles, INPUT_ROLES, self)] = self.shape[1]
        tiling = Tiling(tuple(extents), _zeros(self.zeros_per_block), self.remainder)
        tiling.check(shape, self)
        return tiling

    def __str__(self) -> str:
        text = _block_text("block", self.shape, self.zeros_per_block)
        return text + _policy_text(self.remainder)


@dataclass(frozen=True)
class StorageBlock(Pattern):
    """The classic sparsifiers' block: it speaks of the last two storage dimensions, not of roles.

    A one-dimensional weight counts as a single row. Ragged edges are blocks of what they have.
    """

    shape: tuple[int, int] = (1, 4)
    zeros_per_block: int | None = None

    def __post_init__(self) -> None:
        _check_block(self.shape, self.zeros_per_block)

    def tiling(self, shape: Sequence[int], roles: Sequence[Role]) -> Tiling:
        """See `Pattern.tiling`; `roles` are not looked at, and every weight fits."""
        extents = (1,) * (len(shape) - 2) + self.shape[-min(len(shape), 2) :]
        zeros = _zeros(self.zeros_per_block)
        if zeros != "all" and len(shape) == 1:
            zeros = min(int(zeros), extents[0])
        return Tiling(extents, zeros, "pad")

    def __str__(self) -> str:
        return _block_text("storage-block", self.shape, self.zeros_per_block)


@dataclass(frozen=True)
class Rows(Pattern):
    """Whole output rows: table rows of an embedding, output channels of the rest."""

    def tiling(self, shape: Sequence[int], roles: Sequence[Role]) -> Tiling:
        """See `Pattern.tiling`."""
        return _slabs(shape, roles, OUTPUT_ROLES, self)

    def __str__(self) -> str:
        return "rows"


@dataclass(frozen=True)
class Channels(Pattern):
    """Whole input channels: the columns of a Linear, one coordinate of every embedding vector."""

    def tiling(self, shape: Sequence[int], roles: Sequence[Role]) -> Tiling:
        """See `Pattern.tiling`."""
        return _slabs(shape, roles, INPUT_ROLES, self)

    def __str__(self) -> str:
        return "channels"


_NAMED: dict[str, Pattern] = {
    "unstructured": Unstructured(),
    "unstructured:out": Unstructured(per="out"),
    "rows": Rows(),
    "channels": Channels(),
}


def _slabs(
    shape: Sequence[int], roles: Sequence[Role], wanted: frozenset[Role], pattern: Pattern
) -> Tiling:
    """Blocks that span everything but one dimension, and a batch (each expert has its own)."""
    dim = _single(roles, wanted, pattern)
    return Tiling(
        tuple(
            1 if d == dim or role == "batch" else size
            for d, (size, role) in enumerate(zip(shape, roles, strict=True))
        )
    )


def _check_block(shape: tuple[int, int], zeros_per_block: int | None) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise PatternError(f"a block shape is two positive integers, found {shape!r}")
    if zeros_per_block is not None and not 0 <= zeros_per_block <= math.prod(shape):
        raise PatternError(
            f"zeros_per_block must lie in 0..{math.prod(shape)} for a block of "
            f"{shape[0]}x{shape[1]}, found {zeros_per_block}"
        )


def _zeros(zeros_per_block: int | None) -> int | Literal["all"]:
    return "all" if zeros_per_block is None else zeros_per_block


def _block_text(name: str, shape: tuple[int, int], zeros_per_block: int | None) -> str:
    suffix = "" if zeros_per_block is None else f":{zeros_per_block}"
    return f"{name}:{shape[0]}x{shape[1]}{suffix}"


def _policy_text(remainder: Remainder) -> str:
    return "" if remainder == "error" else f" {remainder}"


@dataclass(frozen=True, init=False)
class SparsityConfig:
    """What a mapping assigns to a weight: a pattern, and the share of it that goes.

    Args:
        pattern: a `Pattern`, or a string that `Pattern.parse` reads.
        level: share of blocks (elements, for unstructured) to prune, in [0, 1]. Left out for a
            pattern that fixes its own level (2:4); required for the others.

    Raises:
        PatternError: unknown pattern.
        ValueError: the level is missing, outside [0, 1], or contradicts the pattern.
    """

    pattern: Pattern
    level: float

    def __init__(self, pattern: str | Pattern, level: float | None = None) -> None:
        pattern = Pattern.parse(pattern)
        implied = pattern.implied_level
        if level is None:
            if implied is None:
                raise ValueError(f"pattern {pattern} needs a level in [0, 1]")
            level = implied
        if not 0 <= level <= 1:
            raise ValueError(f"a sparsity level lies in [0, 1], found {level!r}")
        if implied is not None and level != implied:
            raise ValueError(
                f"pattern {pattern} fixes its level at {implied:g}, found {level!r}; leave it out"
            )
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "level", float(level))

    @staticmethod
    def parse(text: "str | SparsityConfig") -> "SparsityConfig":
        """Read `"2:4"`, `"unstructured 50%"` or `"block:1x4 pad 50%"`; `str(config)` is read back.

        Raises:
            PatternError: the pattern or the level cannot be read.
            ValueError: as for the constructor.
        """
        if isinstance(text, SparsityConfig):
            return text
        if not isinstance(text, str):
            raise TypeError(f"expected a SparsityConfig or a string, found {type(text).__name__}")
        match = re.fullmatch(r"(.*?)(?:\s+(\d+(?:\.\d+)?(?:e-?\d+)?)%)?", text.strip())
        assert match is not None  # every part is optional
        level = None if match[2] is None else float(match[2]) / 100
        return SparsityConfig(match[1], level)

    def __str__(self) -> str:
        if self.pattern.implied_level is not None:
            return str(self.pattern)
        return f"{self.pattern} {self.level * 100:.12g}%"

    @property
    def short(self) -> str:
        """As `str`, but the level with three significant digits: for people."""
        if self.pattern.implied_level is not None:
            return str(self.pattern)
        return f"{self.pattern} {self.level * 100:.3g}%"
