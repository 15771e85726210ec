"""Which layer is lowered, and with which kernel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.selector import Selector, matches, type_name
from fx_sparsity.kernels.packings import DENSE, PACKINGS, packing_for
from fx_sparsity.lowering import timing
from fx_sparsity.lowering.dense_tables import ROWS, DenseTable, Lookup
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.lowering.lowered import LoweredLinear

AUTO, ALWAYS = "auto", "always"
_AS_WELL = 1.02
"""A dense packing of ours is taken where it is no more than so many times slower than sparse."""
Rule = str | None
"""`"auto"`, `"always"`, the name of a packing, or None for a weight that stays dense."""
Rules = Mapping[str | type[nn.Module], Rule]
"""A name of a weight or its owner, `"re:..."`, or a class of modules -> its rule."""
_REGEX = "re:"


class LoweringError(FxSparsityError, ValueError):
    """A model cannot be lowered, or not by these rules. Nothing was changed."""


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


def not_smaller(packing: str, nbytes: int, dense: int) -> str:
    """Why a layer stays dense that takes so many bytes in its smallest packing."""
    return f"not sparse enough: {packing} takes {nbytes} bytes, dense {dense}"


@dataclass(frozen=True)
class Choice:
    """What becomes of one weight.

    Attributes:
        packing: that it gets; None if it stays dense.
        gain: tokens -> times faster than dense, where measured.
        up_to: most tokens that go to the kernel, where the dense form is kept; None for all.
        reason: why it stays dense; empty otherwise.
        packed: the layer in that packing, where it was made to choose.
    """

    packing: str | None
    gain: Mapping[int, float] = field(default_factory=dict)
    up_to: int | None = None
    reason: str = ""
    packed: LoweredLinear | Lookup | None = None


class Policy:
    """What to do with each layer; the most specific rule wins, see `Selector`.

    Args:
        policy: one rule for all layers; or rules by names of weights and their owners, by regular
            expressions, and by classes of owners, the most derived first. What no rule names stays
            dense.

    Raises:
        LoweringError: a rule that is neither a policy nor a packing.
    """

    def __init__(self, policy: str | Rules) -> None:
        rules: Rules = {nn.Module: policy} if isinstance(policy, str) else policy
        known = (AUTO, ALWAYS, *PACKINGS, ROWS)
        for key, rule in rules.items():
            if not (rule is None or rule in known):
                where = "policy" if isinstance(policy, str) else f"policy for {type_name(key)!r}"
                raise LoweringError(
                    f"{where}: expected {', '.join(map(repr, known))} or None, found {rule!r}"
                )
        texts = {key: rule for key, rule in rules.items() if isinstance(key, str)}
        self._rules: Selector[Rule] = Selector(
            {key: rule for key, rule in texts.items() if not key.startswith(_REGEX)},
            {k.removeprefix(_REGEX): rule for k, rule in texts.items() if k.startswith(_REGEX)},
            {key: rule for key, rule in rules.items() if isinstance(key, type)},
        )
        self._asked: set[str] = set()
        self.table = timing.read_table()
        self._read = set(self.table)

    def rule(self, fqns: Sequence[str], owner: type[nn.Module]) -> tuple[Rule, str]:
        """The rule for a weight; and where that is None, the reason.

        Args:
            fqns: every name of the weight.
            owner: class of the module that holds it.
        """
        self._asked.update(fqns)
        found = self._rules.select(fqns, owner.__mro__)
        if found is None:
            return None, "no rule names it"
        return found.value, f"excluded by {found.entry}"

    def unused(self) -> list[str]:
        """Names and expressions that no weight has had so far."""
        regexes = (regex for regex in self._rules.regexes if not matches(regex, self._asked))
        return [*self._rules.unknown_names(self._asked), *(_REGEX + regex for regex in regexes)]

    def choose(
        self,
        fqn: str,
        layer: DenseLinear | DenseTable,
        rule: str,
        *,
        tokens: Sequence[int],
        input_dtype: torch.dtype,
        model_bytes: int,
        keep_dense: bool,
    ) -> Choice:
        """What becomes of a layer that has a rule.

        Args:
            fqn: of its weight.
            layer: the layer.
            rule: not None.
            tokens: rows of activations in its calls, in ascending order.
            input_dtype: of the activations.
            model_bytes: of all weights of the model.
            keep_dense: a kernel may take the calls up to some number of tokens, dense the others.

        Raises:
            LoweringError: a packing was asked for by name that this weight cannot have.
        """
        linear = isinstance(layer, DenseLinear)
        if rule not in (AUTO, ALWAYS):
            if linear != (rule in PACKINGS):
                return Choice(None, reason=f"{rule!r} is no packing for it")
            in_groups = isinstance(layer, DenseLinear) and layer.in_groups
            packing = packing_for(rule, layer.device, in_groups)
            if (refusal := layer.refusal(packing)) is not None:
                raise LoweringError(f"{fqn}: packing {packing!r} cannot hold it: {refusal}")
            return Choice(packing)
        fitting, refusals = layer.candidates()
        if not fitting:
            return Choice(None, reason="; ".join(refusals))
        names = sorted(fitting, key=lambda name: fitting[name].nbytes)
        smaller = [name for name in names if fitting[name].nbytes < layer.nbytes]
        smaller = _up_to_dense(smaller)
        if not smaller:
            least = fitting[names[0]].nbytes
            return Choice(None, reason=not_smaller(names[0], least, layer.nbytes))
        if rule == ALWAYS:
            return Choice(smaller[0], packed=fitting[smaller[0]])
        if layer.device.type == "cuda" and layer.mode:
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


def _up_to_dense(names: Sequence[str]) -> list[str]:
    """Packings in ascending size, without those that a dense one undercuts."""
    dense = next((i for i, name in enumerate(names) if name.startswith(DENSE)), len(names))
    return list(names[: dense + 1])


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
        dense = next((name for name in winners if name.startswith(DENSE)), best)
        if total(dense) <= _AS_WELL * total(best):
            best = dense
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
