"""Which layer is lowered, and with which kernel."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.kernels.packings import PACKINGS, packing_for
from fx_sparsity.lowering import timing
from fx_sparsity.lowering.dense_tables import ROWS, DenseTable, Lookup
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.lowering.lowered import LoweredLinear

AUTO, ALWAYS = "auto", "always"
Wish = str | None
"""`"auto"`, `"always"`, the name of a packing, or None to leave a weight as it is."""
Rules = Mapping[str | type[nn.Module], Wish]
"""A name of a weight or its owner, `"re:..."`, or a class of modules -> what is wished for."""


class LoweringError(FxSparsityError, ValueError):
    """A model, or what is wished for it, cannot be lowered. Nothing was changed."""


def checked_tokens(tokens: Sequence[int] | None) -> tuple[int, ...] | None:
    """Numbers of tokens in ascending order; None for None.

    Raises:
        LoweringError: none, or one that is not positive.
    """
    if tokens is None:
        return None
    if not tokens or any(not isinstance(count, int) or count < 1 for count in tokens):
        raise LoweringError(f"tokens: expected positive integers, found {tokens!r}")
    return tuple(sorted(set(tokens)))


@dataclass(frozen=True)
class Choice:
    """What becomes of one weight.

    Attributes:
        packing: that it gets; None if it stays as it is.
        gain: tokens -> times faster than dense, where measured.
        up_to: most tokens that go to the kernel, where the dense form is kept; None for all.
        reason: why it stays as it is.
        packed: the layer in that packing, where it was made to choose.
    """

    packing: str | None
    gain: Mapping[int, float] = field(default_factory=dict)
    up_to: int | None = None
    reason: str = ""
    packed: LoweredLinear | Lookup | None = None


class Policy:
    """What to do with each layer; the most specific rule wins.

    Args:
        policy: one wish for all layers; or rules: names first, then regular expressions that match
            a name in full, then classes of owners, the most derived first. What no rule names
            stays as it is.

    Raises:
        LoweringError: a wish that is neither a policy nor a packing.
    """

    def __init__(self, policy: str | Rules) -> None:
        self.rules: Rules = {nn.Module: policy} if isinstance(policy, str) else dict(policy)
        self.table = timing.read_table()
        self._read = set(self.table)
        self._used: set[str | type[nn.Module]] = set()
        known = (AUTO, ALWAYS, *PACKINGS, ROWS)
        for key, wish in self.rules.items():
            if not (wish is None or wish in known):
                where = "policy" if isinstance(policy, str) else f"policy for {_text(key)}"
                raise LoweringError(
                    f"{where}: expected {', '.join(map(repr, known))} or None, found {wish!r}"
                )

    def wish(self, names: Sequence[str], owner: type[nn.Module]) -> tuple[Wish, str]:
        """What is wished for a weight, and why nothing is.

        Args:
            names: every FQN of the weight.
            owner: class of the module that holds it.
        """
        called = [*names, *(name.rpartition(".")[0] for name in names)]
        texts = [key for key in self.rules if isinstance(key, str)]
        keys: list[str | type[nn.Module]] = [key for key in texts if key in called]
        keys += [
            key
            for key in texts
            if key.startswith("re:") and any(re.fullmatch(key[3:], name) for name in called)
        ]
        keys += [base for base in owner.__mro__ if base in self.rules]
        if not keys:
            return None, "no rule names it"
        self._used.update(keys)
        return self.rules[keys[0]], f"excluded by rule {_text(keys[0])}"

    def unused(self) -> list[str]:
        """Names and expressions that no weight has had so far."""
        return [key for key in self.rules if isinstance(key, str) and key not in self._used]

    def choose(
        self,
        fqn: str,
        layer: DenseLinear | DenseTable,
        wish: str,
        *,
        tokens: Sequence[int],
        input_dtype: torch.dtype,
        model_bytes: int,
        keep_dense: bool,
    ) -> Choice:
        """What becomes of a layer that something is wished for.

        Args:
            fqn: of its weight.
            layer: the layer.
            wish: not None.
            tokens: rows of activations in its calls, in ascending order.
            input_dtype: of the activations.
            model_bytes: of all weights of the model.
            keep_dense: a kernel may take the calls up to some number of tokens, dense the others.

        Raises:
            LoweringError: a packing was asked for by name that this weight cannot have.
        """
        linear = isinstance(layer, DenseLinear)
        if wish not in (AUTO, ALWAYS):
            if linear != (wish in PACKINGS):
                return Choice(None, reason=f"{wish!r} is no packing for it")
            packing = packing_for(wish, layer.device)
            if (refusal := layer.refusal(packing)) is not None:
                raise LoweringError(f"{fqn}: packing {packing!r} cannot hold it: {refusal}")
            return Choice(packing)
        fitting, refusals = layer.candidates()
        if not fitting:
            return Choice(None, reason="; ".join(refusals))
        names = sorted(fitting, key=lambda name: fitting[name].nbytes)
        smaller = [name for name in names if fitting[name].nbytes < layer.nbytes]
        if not smaller:
            least = fitting[names[0]].nbytes
            reason = f"not sparse enough: {names[0]} takes {least} bytes, dense {layer.nbytes}"
            return Choice(None, reason=reason)
        if wish == ALWAYS:
            return Choice(smaller[0], packed=fitting[smaller[0]])
        if layer.device.type == "cuda" and layer.how:
            reason = f"{layer.dtype} is not timed on CUDA: name the packing, or 'always'"
            return Choice(None, reason=reason)
        timed = timing.measure(
            layer,
            {name: fitting[name] for name in smaller},
            tokens,
            input_dtype=input_dtype,
            model_bytes=model_bytes,
            table=self.table,
        )
        choice = _fastest(timed, keep_dense and linear)
        return choice if choice.packing is None else replace(choice, packed=fitting[choice.packing])

    def save(self) -> None:
        """Keep what was measured for the next time."""
        if measured := {key: t for key, t in self.table.items() if key not in self._read}:
            timing.write_table(measured)
            self._read.update(measured)


def _fastest(timed: Mapping[str, Mapping[int, timing.Timing]], keep_dense: bool) -> Choice:
    """The packing that takes the least time where it beats dense; with why, if none does."""

    def total(name: str) -> float:
        return sum(t.packed_us for t in timed[name].values())

    def reach(name: str) -> int:
        """Tokens up to which every measured call beats dense; 0 for none."""
        won = 0
        for tokens, t in timed[name].items():
            if not t.faster:
                break
            won = tokens
        return won

    largest = max(next(iter(timed.values())))
    winners = [name for name in timed if reach(name) == largest]
    if winners:
        best = min(winners, key=total)
        return Choice(best, _gains(timed[best]))
    best = max(timed, key=lambda name: (reach(name), -total(name)))
    if keep_dense and reach(best):
        return Choice(best, _gains(timed[best]), reach(best))
    lost = {tokens: t for tokens, t in timed[best].items() if not t.faster}
    tokens, t = next(iter(lost.items()))
    found = f"{t.gain:.2g}x, at least {t.at_least:.2g}x"
    return Choice(
        None,
        _gains(timed[best]),
        reason=f"not faster here: {best} at {tokens} tokens {found} of dense ({t.dense})",
    )


def _gains(timed: Mapping[int, timing.Timing]) -> dict[int, float]:
    return {tokens: t.gain for tokens, t in timed.items()}


def _text(key: str | type[nn.Module]) -> str:
    return repr(key) if isinstance(key, str) else key.__name__
