"""Where pruned weights go: into the files of a copy of their checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from fx_sparsity.checkpoints.checkpoint import Checkpoint
from fx_sparsity.checkpoints.checkpoint_record import RECORD, REPORT, CheckpointRecord, pack_mask
from fx_sparsity.checkpoints.loaded import LoadedModel, same_bits
from fx_sparsity.checkpoints.mapped_checkpoint import MappedCheckpoint
from fx_sparsity.checkpoints.report import CheckpointReport, CheckpointWeight
from fx_sparsity.checkpoints.run import Run
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.pruning.methods.calibrated import Sequential
from fx_sparsity.pruning.plan import Plan
from fx_sparsity.pruning.report import PrunedWeight
from fx_sparsity.pruning.stores import Solved


class PrunedFiles:
    """Writes pruned weights into a copy of a checkpoint; see `Store`.

    Args:
        run: makes the copy.
        source: the checkpoint.
        held: its tensors.
        loaded: the model over them.
        sequential: whether what is done already is to be seen by the walk.

    Attributes:
        rows: FQN -> what was done to it, in all calls so far.
    """

    how_to_resume = "Make the same call again to go on."

    def __init__(
        self,
        run: Run,
        source: Checkpoint,
        held: MappedCheckpoint,
        loaded: LoadedModel,
        sequential: Sequential,
    ) -> None:
        self._run, self._source, self._held = run, source, held
        self._loaded, self._sequential = loaded, sequential
        rows = [
            PrunedWeight(**{**row, "notes": tuple(row["notes"])})
            for row in run.done.get("rows", ())
        ]
        self.rows = {row.fqn: row for row in rows}
        self._written = set(run.done.get("written", ()))
        self._out: MappedCheckpoint
        self._record: CheckpointRecord

    def is_done(self, plan: Plan) -> bool:
        """See `Store.is_done`.

        Raises:
            CheckpointError: it is done, but to another pattern or level.
        """
        row = self.rows.get(plan.fqn)
        if row is None:
            return False
        if (row.pattern, row.level) != (str(plan.config.pattern), plan.config.level):
            raise self._run.begun_otherwise(
                f"{plan.fqn} is pruned to {row.pattern} at {row.level:.1%} there, "
                f"now it is {plan.config.pattern} at {plan.config.level:.1%}"
            )
        return True

    def begin(
        self, weights: WeightMap, plans: Mapping[str, Plan], tensors: Mapping[str, Tensor]
    ) -> None:
        """See `Store.begin`: copies what is not copied yet, and undoes what is half done."""
        run, resumed = self._run, bool(self._run.done)
        described = {fqn: _described(weights, plan, tensors[fqn]) for fqn, plan in plans.items()}
        known = run.done["weights"] if resumed else described
        if added := [fqn for fqn in plans if fqn not in known]:
            raise run.begun_otherwise(f"{added[0]} was to stay dense")
        run.begin({"weights": described, "masks": {}, "zeros": {}, "rows": [], "written": []})
        names = (*self._source.shards, self._source.index, *self._source.others)
        run.copy([name for name in names if name not in (None, REPORT, RECORD)])
        self._record = CheckpointRecord(run.folder, run.done["weights"], run.done["masks"])
        self._out = MappedCheckpoint(self._source, run.folder, writable=True)
        if resumed:
            for name in self._out.keys() - self._written:
                if not same_bits(self._out[name], self._held[name]):
                    self._out[name].copy_(self._held[name])
        for parameter in self._loaded.model.parameters():
            parameter.data = self._out[self._loaded.names[id(parameter)][0]]

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """See `Store.read`: from the source, where the walk is to see what is done as it was."""
        names = self._loaded.by_fqn.get(fqn, [])
        if not self._sequential and not self._written.isdisjoint(names):
            return self._held[names[0]]
        return tensor

    def write(self, row: PrunedWeight, solved: Solved, bias: tuple[Tensor, Tensor] | None) -> None:
        """See `Store.write`; what an interruption leaves is undone when the call is repeated."""
        names = list(self._loaded.by_fqn[row.fqn])
        for name in names:
            self._out[name].copy_(solved.value)
        if bias is not None:
            also = self._loaded.names[id(bias[0])]
            names += also
            for name in also:
                self._out[name].copy_(bias[1])
        self._out.flush(*names)
        mask = pack_mask(solved.keep, solved.value)
        self._record.add(row.fqn, mask, row.level)
        self._record.sync()
        self._written.update(names)
        self.rows[row.fqn] = row
        done = self._run.done
        done["zeros"][row.fqn] = mask.zeros
        done["rows"].append(asdict(row))
        done["written"] = sorted(self._written)
        self._run.save()

    def finish(self, dense: Mapping[str, str]) -> None:
        """Write what is measured anew, and the record; give the target its name.

        Args:
            dense: FQN -> the reason why a weight was not pruned.
        """
        for buffer in self._loaded.model.buffers():
            for name in self._loaded.names.get(id(buffer), ()):
                if not same_bits(self._out[name], buffer):
                    self._out[name].copy_(buffer)
                    self._out.flush(name)
        self._record.finish(self._report(dense))
        self._run.finish()

    def _report(self, dense: Mapping[str, str]) -> CheckpointReport:
        """What became of the weights, by all names that the checkpoint has for each."""
        known, zeros = self._run.done["weights"], self._run.done["zeros"]
        pruned = [
            CheckpointWeight(
                fqn=name,
                pattern=str(SparsityConfig(row.pattern, row.level)),
                reason="",
                roles=tuple(known[fqn]["roles"]),
                elements=self._held[name].numel(),
                zeros=zeros[fqn],
            )
            for fqn, row in self.rows.items()
            for name in self._loaded.by_fqn[fqn]
        ]
        others = [
            CheckpointWeight(name, None, reason, (), self._held[name].numel(), None)
            for fqn, reason in dense.items()
            for name in self._loaded.by_fqn.get(fqn, ())
        ]
        return CheckpointReport((*pruned, *others))


def _described(weights: WeightMap, plan: Plan, tensor: Tensor) -> dict[str, Any]:
    """What a record says of a weight, but for its level."""
    return {
        "shape": list(tensor.shape),
        "roles": list(weights[plan.fqn].roles),
        "pattern": str(plan.config.pattern),
        "aliases": list(weights[plan.fqn].aliases),
    }
