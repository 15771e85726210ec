"""All verbs on a model, in any order, with failures in between, against a model of what holds."""

import copy
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn
from torch.nn.utils import parametrize

import fx_sparsity as fxs
from fx_sparsity.sparsifier import Mask, MaskError, load_dense_state_dict
from fx_sparsity.sparsifier.target import Target

FQNS = ("0.weight", "2.weight", "4.weight")
FAILURES = st.none() | st.integers(0, 3)
"""At which call a verb fails; None for not at all."""


@contextmanager
def failing(owner, name, at):
    """Have a function raise at one of its calls."""
    usual, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == at + 1:
            raise MemoryError("injected")
        return usual(*args, **kwargs)

    with patch.object(owner, name, call):
        yield


class Verbs(RuleBasedStateMachine):
    """`held`: FQN -> [values beneath, mask or None, squashed]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)]
        self.model = nn.Sequential(*layers)
        self.sparsifier = self.fresh()
        self.held = {fqn: [self.beneath(fqn).clone(), None, False] for fqn in FQNS}
        self.saved = None

    @staticmethod
    def fresh():
        return fxs.WeightNormSparsifier(
            sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1
        )

    def beneath(self, fqn):
        owner = self.model.get_submodule(fqn.partition(".")[0])
        if parametrize.is_parametrized(owner):
            return owner.parametrizations.weight.original.detach()
        return owner.weight.detach()

    def attempt(self, call, owner, name, at):
        """Whether a verb came to its end; one that did not, was to fail."""
        if at is None:
            call()
            return True
        try:
            with failing(owner, name, at):
                call()
        except MemoryError:
            return False
        return True

    @rule(fqns=st.sets(st.sampled_from(FQNS), min_size=1), at=FAILURES)
    def prepare(self, fqns, at):
        new = [fqn for fqn in sorted(fqns) if self.held[fqn][1] is None]
        config = [{"tensor_fqn": fqn} for fqn in new]
        if new and self.attempt(
            lambda: self.sparsifier.prepare(self.model, config), Target, "attach", at
        ):
            for fqn in new:
                self.held[fqn][1] = torch.ones_like(self.held[fqn][0], dtype=torch.bool)

    @precondition(lambda self: self.sparsifier.model is not None)
    @rule(at=FAILURES)
    def step(self, at):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = self.attempt(self.sparsifier.step, self.sparsifier, "update_mask", at)
        for values, mask, squashed in self.held.values() if done else ():
            if mask is not None and not squashed:
                order = values.abs().flatten().double().sort(stable=True).indices
                mask.fill_(True).view(-1)[order[: round(0.5 * values.numel())]] = False

    @rule(seed=st.integers(0, 99))
    def train(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for fqn, entry in self.held.items():
            change = torch.randn(entry[0].shape, generator=generator)
            self.beneath(fqn).add_(change)
            entry[0] = entry[0] + change

    @precondition(lambda self: self.sparsifier.names)
    @rule(at=FAILURES, name=st.sampled_from(["bake", "detach"]))
    def squash(self, at, name):
        call, owner = lambda: fxs.squash(self.model, self.sparsifier), Mask
        if not self.attempt(call, Target if name == "detach" else owner, name, at):
            call()  # it can be repeated
        for entry in self.held.values():
            if entry[1] is not None:
                entry[0], entry[2] = entry[0].masked_fill(~entry[1], 0), True

    @precondition(lambda self: self.sparsifier.names)
    @rule()
    def unprepare(self):
        if any(squashed for *_, squashed in self.held.values()):
            with pytest.raises(MaskError, match="squashed"):
                fxs.unprepare(self.model, self.sparsifier)
            return
        fxs.unprepare(self.model, self.sparsifier)
        for entry in self.held.values():
            entry[1] = None

    @precondition(lambda self: self.sparsifier.names)
    @rule()
    def save_masks(self):
        masks = {fqn: entry[1].clone() for fqn, entry in self.held.items() if entry[1] is not None}
        squashed = [fqn for fqn, entry in self.held.items() if entry[2]]
        self.saved = copy.deepcopy(self.sparsifier.state_dict()), masks, squashed

    @precondition(lambda self: self.saved and self.sparsifier.model is not None)
    @rule(bad=st.booleans())
    def load_masks(self, bad):
        state, masks, squashed = copy.deepcopy(self.saved)
        now = [fqn for fqn in FQNS if self.held[fqn][1] is not None]
        if [*masks] != now or squashed != [fqn for fqn in now if self.held[fqn][2]]:
            return
        if bad:
            last = now[-1]
            state["state"][last]["mask"] = torch.ones(3, 3, dtype=torch.bool)
            with pytest.raises(MaskError, match=last.replace(".", r"\.")):
                self.sparsifier.load_state_dict(state)
            return
        self.sparsifier.load_state_dict(state)
        for fqn, mask in masks.items():
            self.held[fqn][1] = mask

    @rule(seed=st.integers(0, 99))
    def load_dense_weights(self, seed):
        torch.manual_seed(seed)
        state = {f"{i}.{kind}": torch.randn(4 if i == 4 else 6, *([6] if kind == "weight" else []))
                 for i in (0, 2, 4) for kind in ("weight", "bias")}  # fmt: skip
        load_dense_state_dict(self.model, state)
        for fqn, entry in self.held.items():
            entry[0] = state[fqn].clone()

    @rule(fqn=st.sampled_from(FQNS))
    def write_what_is_lost(self, fqn):
        _, mask, squashed = self.held[fqn]
        if mask is None or squashed:
            return
        owner = self.model.get_submodule(fqn.partition(".")[0])
        nn.init.ones_(owner.weight)
        with pytest.warns(UserWarning, match=f"{fqn}: something wrote in place"):
            _ = owner.weight

    @rule()
    def copy_both(self):
        self.model, self.sparsifier = copy.deepcopy((self.model, self.sparsifier))

    @rule()
    def through_a_file(self):
        plain = nn.Sequential(
            nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)
        )
        with tempfile.TemporaryDirectory() as folder:
            fxs.save(fxs.sparsifier.dense_state_dict(self.model), Path(folder) / "f")
            fxs.load(Path(folder) / "f", plain)
        for fqn in FQNS:
            assert torch.equal(plain.get_parameter(fqn), self.seen(fqn))

    def seen(self, fqn):
        """What the model is to see."""
        values, mask, squashed = self.held[fqn]
        return values if mask is None or squashed else values.masked_fill(~mask, 0)

    @invariant()
    def holds(self):
        masked = {fqn for fqn, entry in self.held.items() if entry[1] is not None}
        assert set(self.sparsifier.names) == masked
        for fqn, (values, mask, squashed) in self.held.items():
            owner = self.model.get_submodule(fqn.partition(".")[0])
            assert torch.equal(self.beneath(fqn), values), fqn
            assert torch.equal(owner.weight, self.seen(fqn)), fqn
            assert parametrize.is_parametrized(owner) == (mask is not None and not squashed)
            if mask is not None:
                assert torch.equal(self.sparsifier.get_mask(fqn), mask)
        if masked:
            record = fxs.SparsityRecord.of(self.sparsifier)
            lost = [fqn for fqn in masked if self.seen(fqn)[~record[fqn].keep].any()]
            young = [fqn for fqn in masked if record[fqn].keep.all()]  # no step yet: no pattern
            assert fxs.verify(self.model, record).ok == (not lost and not young)


Verbs.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
TestVerbs = Verbs.TestCase
