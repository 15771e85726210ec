"""A model whose weights are tried in several forms: what each may become, and what that takes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import nn

from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.mapping import Config, MappingError, SparsityMapping
from fx_sparsity.graph.weight_map import WeightMap, WeightSite
from fx_sparsity.patterns import PatternError, SparsityConfig
from fx_sparsity.pruning.batches import Batch, Frame, capture, check_forms, read_batches
from fx_sparsity.pruning.gradients import collect_gradients
from fx_sparsity.pruning.methods import CalibratedSparsifier
from fx_sparsity.pruning.plan import Decision, Plan, Unreachable, decide, plan_site
from fx_sparsity.pruning.prune import PruneOptions, check_method
from fx_sparsity.pruning.pruner import Pruner
from fx_sparsity.pruning.stores import MaskStore, Store
from fx_sparsity.pruning.trial import Trial, pruned
from fx_sparsity.pruning.undisturbed import buffers_kept, evaluating
from fx_sparsity.sparsifier.mask import masked_weights
from fx_sparsity.sparsifier.target import MaskError

Candidates = str | Iterable[Config] | Callable[[WeightSite], Iterable[Config]]
"""What each weight may become, besides dense: one or several for all, or by a function of its
site."""


@dataclass(frozen=True)
class Probe:
    """A model in eval mode, as it was captured.

    Attributes:
        frame: of the model.
        decision: its weights, and the reasons for those that stay dense.
        plans: FQN -> what the weight may become.
        notes: which candidates do not fit which weights.
        pruner: of all weights.
        store: how the batches see the weights: as they are.
        batches: all of them.
        options: of pruning.
    """

    frame: Frame
    decision: Decision
    plans: Mapping[str, Sequence[Plan]]
    notes: tuple[str, ...]
    pruner: Pruner
    store: Store
    batches: Sequence[Batch]
    options: PruneOptions

    def pruned(self, chosen: Mapping[str, Plan]) -> AbstractContextManager[Trial]:
        """The model pruned by some plans for a while, see `trial.pruned`."""
        how = (self.options.in_turn(self.pruner.sparsifier), self.options.all_experts)
        return pruned(self.pruner, chosen, self.frame, self.store, self.batches, *how)


@contextmanager
def probing(
    model: nn.Module,
    sparsifier: CalibratedSparsifier,
    batches: Iterable[ExampleInputs],
    candidates: Candidates,
    options: PruneOptions,
) -> Iterator[Probe]:
    """A model ready to be tried, which is as it was afterwards.

    Args:
        model: as `prune` takes it, without masks; no ExportedProgram.
        sparsifier: that is to prune it, without masks; not changed.
        batches: as `prune` takes them.
        candidates: what each weight may become.
        options: as `prune` takes them; without an allocation.

    Raises:
        TypeError: `model` is no module, or the sparsifier needs no data.
        MaskError: the model or the sparsifier has masks, or a weight cannot be masked.
        What `prune` raises before it changes anything.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a module, found {type(model).__name__}; of a program, pass what its "
            "`module()` returns"
        )
    gradients = check_method(sparsifier, options)
    if masked := [*masked_weights(model), *sparsifier.names]:
        raise MaskError(
            f"{', '.join(dict.fromkeys(masked))} masked already: squash the model first, and pass "
            "a sparsifier that has not pruned yet"
        )
    read = read_batches(model, batches, options.token_weights)
    with evaluating(model), buffers_kept(model):
        check_forms(model, read)
        frame = capture(model, read, options.dynamic_shapes)
        wanted = _configs(frame, candidates)
        # Any pattern fits here that fits every weight: it says which weights can be pruned at all.
        mapping = SparsityMapping().set_rule(
            lambda site: "unstructured 50%" if wanted[site.fqn] else None
        )
        decision = decide(frame, sparsifier, mapping, lambda plan: False)
        plans, notes = _fitting(frame, decision, wanted)
        store = MaskStore(model, sparsifier)
        pruner = Pruner(sparsifier, decision.plans, decision.weights, None, store)
        if options.loss is not None and gradients:
            pruner.hold(collect_gradients(model, read, options.loss, decision.weights))
        yield Probe(frame, decision, plans, tuple(notes), pruner, store, read, options)


def _configs(frame: Frame, candidates: Candidates) -> dict[str, list[SparsityConfig]]:
    """FQN -> what it may become, each once."""
    of = candidates if callable(candidates) else None
    same: list[Config] = []
    if not callable(candidates):
        same = [candidates] if isinstance(candidates, str) else list(candidates)
    return {
        site.fqn: list(
            dict.fromkeys(
                SparsityConfig.parse(config)
                for config in (same if of is None else of(site))
                if config is not None
            )
        )
        for site in frame.weights.sites
    }


def _fitting(
    frame: Frame, decision: Decision, wanted: Mapping[str, Sequence[SparsityConfig]]
) -> tuple[dict[str, list[Plan]], list[str]]:
    """The plans of the candidates that fit; and which do not, in words."""
    plans: dict[str, list[Plan]] = {}
    notes = []
    for fqn in decision.plans:
        site = frame.weights[fqn]
        for config in wanted[fqn]:
            try:
                SparsityMapping().set_global(config).resolve(WeightMap((site,)), partial=True)
                plans.setdefault(fqn, []).append(plan_site(frame, site, config))
            except (MappingError, PatternError, Unreachable) as error:
                notes.append(f"{config} does not fit: {error}")
        if fqn not in plans:
            decision.dense[fqn] = "none of its candidates fits"
    return plans, notes
