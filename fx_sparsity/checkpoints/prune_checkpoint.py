"""One-shot pruning of a checkpoint that need not fit into memory, from files to files."""

import copy
import ctypes
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fx_sparsity.checkpoints.checkpoint import CheckpointError
from fx_sparsity.checkpoints.sharded import CheckpointFiles, MappedCheckpoint
from fx_sparsity.graph.example_inputs import ExampleInputs, call_arguments
from fx_sparsity.graph.mapping import MappingLike
from fx_sparsity.graph.named_tensors import named_tensors
from fx_sparsity.graph.uses import canonical_fqn
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.masks.bits import pack_bits
from fx_sparsity.pruning.methods import CalibratedSparsifier
from fx_sparsity.pruning.plan import Plan
from fx_sparsity.pruning.prune import GRADIENTS, PruneOptions, calibrate
from fx_sparsity.pruning.report import PrunedWeight, PruningReport
from fx_sparsity.sparsifier import SparsityRecord
from fx_sparsity.sparsifier.record import MaskRecord
from fx_sparsity.storage.mapped import MappedFile, create_file

_log = logging.getLogger(__name__)
RECORD = "sparsity.record"
"""Name of the file with the masks, which `SparsityRecord.load` reads."""
_PROGRESS, _MASKS = ".pruning.json", ".pruning.masks"
_ZEROS = "::zeros"
_COUNTERS = frozenset({"steps", "enable_mask_update", "_said_squashed"})
_SHOWN = 8


def prune_checkpoint(
    model: nn.Module,
    sparsifier: CalibratedSparsifier,
    batches: Iterable[ExampleInputs],
    mapping: MappingLike | None = None,
    *,
    source: str | Path,
    target: str | Path,
    names: Mapping[str, str] | None = None,
    sequential: bool = True,
    dynamic_shapes: Any = None,
    correct_bias: bool = False,
    progress: bool | None = None,
) -> PruningReport:
    """Prune a checkpoint in one shot, as `prune` does a model, without ever loading it.

    The checkpoint is copied, and the model's parameters are the copy's files, mapped into memory:
    a weight is read from the disk where it is used, and its pages are the system's to take back.
    Pruned weights are written into the copy, one by one, bit for bit as `prune` would have them,
    with zeros in place of masks. In memory are the activations of all batches that are needed
    later, and a weight's statistics and its solution in single precision; the report has figures.

    The copy grows in `<target>.partial` and gets its name when it is complete. After an
    interruption, the same call goes on with the weights that are not done yet.

    Args:
        model: the architecture; neither run nor changed. Parameters may be on the meta device, for
            their data are not looked at, and have the checkpoint's dtype in what follows. Buffers
            that the checkpoint lacks must be real: build under `parameters_on_meta()`.
        sparsifier: chooses masks and values. It is not bound to anything afterwards.
        batches: as `prune` takes them, on the CPU.
        mapping: as `prune` takes it.
        source: a directory of safetensors files, those of its index where it has one, or one file.
        target: directory to be; files as in `source`, and `sparsity.record`, which
            `SparsityRecord.load` reads. Beside the files of tensors those in the directory itself
            are copied, but for weights in other forms.
        names: FQN in the model -> name in the checkpoint, where they differ. What the checkpoint
            holds beyond the model is copied as it is, and listed in `report.dense`.
        sequential: as `prune` takes it.
        dynamic_shapes: as `prune` takes it.
        correct_bias: as `prune` takes it.
        progress: as `prune` takes it.

    Returns:
        What was done to each weight, before an interruption, too.

    Raises:
        CheckpointError: parameters that the checkpoint lacks or has in another shape or in codes,
            buffers without data, or a partial target that was begun otherwise.
        FileExistsError: `target` exists.
        FileNotFoundError: see `CheckpointFiles.find`.
        FileFormatError: `source` is malformed.
        ValueError: the method needs gradients, which would take the room of all weights.
        InputError, MappingError, PatternError, MaskError, CalibrationError: as `prune`.

        Whatever is raised before the first weight is done, `target` and `source` are as they were.
    """
    if isinstance(sparsifier, CalibratedSparsifier) and sparsifier.needs & GRADIENTS:
        raise ValueError(
            f"{type(sparsifier).__name__} needs gradients of all weights at once; "
            "load the model and call prune"
        )
    target, batches = Path(target), list(batches)
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it, or choose another target")
    files = CheckpointFiles.find(source)
    held = MappedCheckpoint(files)
    loaded = _Loaded(model, held, dict(names or {}))
    asked = {
        "method": _description(sparsifier),
        "sequential": sequential,
        "correct_bias": correct_bias,
        "batches": _digest(batches),
        "source": {name: (files.root / name).stat().st_size for name in files.weights},
    }
    store = _CheckpointStore(files, held, loaded, target, asked, sequential)
    options = PruneOptions(sequential, dynamic_shapes, None, None, correct_bias, progress)
    report = calibrate(loaded.model, sparsifier, batches, mapping, store, options)
    store.finish()
    surplus = dict.fromkeys(loaded.surplus, "the model has no such tensor; copied")
    dense = {fqn: reason for fqn, reason in report.dense.items() if fqn not in store.done}
    return replace(report, rows=tuple(store.done.values()), dense={**dense, **surplus})


class _Loaded:
    """A copy of a model over a checkpoint's memory maps.

    Args:
        model: not changed.
        held: the checkpoint.
        names: FQN in the model -> name in the checkpoint, where they differ.

    Attributes:
        model: the copy. Its buffers are in memory.
        names: identity of each tensor of the copy -> its names in the checkpoint.
        by_fqn: canonical FQN -> the same names.
        surplus: names in the checkpoint that stand for nothing in the model.

    Raises:
        CheckpointError: they do not fit; every tensor concerned is named.
    """

    def __init__(
        self, model: nn.Module, held: Mapping[str, Tensor], names: Mapping[str, str]
    ) -> None:
        tensors = named_tensors(model)
        parameters = {id(parameter) for parameter in model.parameters()}
        unknown = names.keys() - dict(tensors).keys()
        wrong = [f"{fqn}: names speaks of it, the model has none" for fqn in sorted(unknown)]
        fqns: dict[int, list[str]] = {}
        for fqn, tensor in tensors:
            fqns.setdefault(id(tensor), []).append(fqn)
        memo: dict[int, Any] = {}
        self.names: dict[int, list[str]] = {}
        self.by_fqn: dict[str, list[str]] = {}
        for tensor in {id(tensor): tensor for _, tensor in tensors}.values():
            mine = fqns[id(tensor)]
            found = [name for fqn in mine if (name := names.get(fqn, fqn)) in held]
            if reason := _misfit(tensor, [held[name] for name in found], id(tensor) in parameters):
                wrong.append(f"{mine[0]}: {reason}")
            elif found:
                data = held[found[0]]
                if id(tensor) in parameters:
                    new: Tensor = nn.Parameter(data, tensor.requires_grad)
                else:
                    new = data.clone()
                memo[id(tensor)] = new
                self.names[id(new)] = found
                self.by_fqn |= dict.fromkeys(map(canonical_fqn, mine), found)
        if wrong:
            more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise CheckpointError(
                f"the checkpoint does not fit this {type(model).__name__}:\n  "
                + "\n  ".join(wrong[:_SHOWN])
                + more
            )
        used = {name for found in self.names.values() for name in found}
        self.surplus = [name for name in held if name not in used]
        self.model = copy.deepcopy(model, memo)


def _misfit(tensor: Tensor, found: Sequence[Tensor], parameter: bool) -> str:
    """Why a tensor of a model cannot be what a checkpoint holds under its names; empty if it can.

    Args:
        tensor: of the model.
        found: of the checkpoint, by all names of the tensor.
        parameter: whether it is one.
    """
    if not found and parameter:
        return "the checkpoint lacks it; names={...} tells of other names"
    if not found:
        return (
            "a buffer that the checkpoint lacks, and that has no data on the meta device; build "
            "the model under parameters_on_meta(), where buffers are real"
            if tensor.is_meta
            else ""
        )
    data = found[0]
    if data.shape != tensor.shape:
        return f"expected shape {tuple(tensor.shape)}, the checkpoint has {tuple(data.shape)}"
    floats = tensor.is_floating_point() and data.is_floating_point() and data.itemsize > 1
    if data.dtype != tensor.dtype and not floats:
        return f"expected {tensor.dtype}, the checkpoint has {data.dtype}"
    if any(not _same_bits(data, other) for other in found[1:]):
        return "tied in the model, but the checkpoint has different values under its names"
    return ""


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


class _CheckpointStore:
    """Writes pruned weights into a copy of a checkpoint; see `Store`.

    Args:
        files: of the source.
        held: its tensors.
        loaded: the model over them.
        target: to be made.
        asked: what the call says; a partial target that was begun otherwise is refused.
        sequential: whether what is done already is to be seen by the walk.

    Attributes:
        done: FQN -> what was done to it, in all calls so far.
    """

    how_to_resume = "Make the same call again to go on."

    def __init__(
        self,
        files: CheckpointFiles,
        held: MappedCheckpoint,
        loaded: _Loaded,
        target: Path,
        asked: dict[str, Any],
        sequential: bool,
    ) -> None:
        self._files, self._held, self._loaded, self._sequential = files, held, loaded, sequential
        self._target, self._work = target, target.with_name(target.name + ".partial")
        self._asked = asked
        self._written: set[str] = set()
        self.done: dict[str, PrunedWeight] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._out: MappedCheckpoint
        self._masks: MappedFile
        if (self._work / _PROGRESS).exists():
            self._resume(json.loads((self._work / _PROGRESS).read_text()))
        elif self._work.exists():
            raise FileExistsError(f"{self._work} exists, and was not begun by this; remove it")

    def is_done(self, plan: Plan) -> bool:
        """See `Store.is_done`.

        Raises:
            CheckpointError: it is done, but to another pattern or level.
        """
        row = self.done.get(plan.fqn)
        if row is None:
            return False
        if (row.pattern, row.level) != (str(plan.config.pattern), plan.config.level):
            raise self._begun_otherwise(
                f"{plan.fqn} is pruned to {row.pattern} at {row.level:.1%} there, "
                f"now it is {plan.config.pattern} at {plan.config.level:.1%}"
            )
        return True

    def begin(
        self, weights: WeightMap, plans: Mapping[str, Plan], tensors: Mapping[str, Tensor]
    ) -> None:
        """See `Store.begin`: copies what is not copied yet, and undoes what is half done."""
        resumed = (self._work / _PROGRESS).exists()
        if not resumed:
            self._work.mkdir(parents=True)
            self._save()
        self._files.copy_to(self._work)
        if not (self._work / _MASKS).exists():
            bits = {
                name: (torch.uint8, (-(-tensors[fqn].numel() // 8),))
                for fqn in plans
                for name in (fqn, fqn + _ZEROS)
            }
            create_file(self._work / f"{_MASKS}.new", bits)
            os.replace(self._work / f"{_MASKS}.new", self._work / _MASKS)
        self._masks = MappedFile(self._work / _MASKS, writable=True)
        if added := [fqn for fqn in plans if fqn not in self._masks]:
            raise self._begun_otherwise(f"{added[0]} was to stay dense")
        self._out = MappedCheckpoint(self._files, self._work, writable=True)
        if resumed:
            for name in self._out.keys() - self._written:
                if not _same_bits(self._out[name], self._held[name]):
                    self._out[name].copy_(self._held[name])
        for parameter in self._loaded.model.parameters():
            parameter.data = self._out[self._loaded.names[id(parameter)][0]]
        self._records |= {
            fqn: {
                "shape": list(tensors[fqn].shape),
                "roles": list(weights[fqn].roles),
                "aliases": list(weights[fqn].aliases),
            }
            for fqn in plans
        }
        self._save()

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """See `Store.read`: from the source, where the walk is to see what is done as it was."""
        names = self._loaded.by_fqn.get(fqn, [])
        if not self._sequential and not self._written.isdisjoint(names):
            return self._held[names[0]]
        return tensor

    def write(
        self, row: PrunedWeight, keep: Tensor, value: Tensor, bias: tuple[Tensor, Tensor] | None
    ) -> None:
        """See `Store.write`; what an interruption leaves is undone when the call is repeated."""
        names = list(self._loaded.by_fqn[row.fqn])
        for name in names:
            self._out[name].copy_(value)
        if bias is not None:
            also = self._loaded.names[id(bias[0])]
            names += also
            for name in also:
                self._out[name].copy_(bias[1])
        self._masks[row.fqn].copy_(pack_bits(keep))
        self._masks[row.fqn + _ZEROS].copy_(pack_bits((value == 0) & keep))
        self._out.flush(*names)
        self._masks.flush(row.fqn, row.fqn + _ZEROS)
        self._written.update(names)
        self.done[row.fqn] = row
        self._save()

    def finish(self) -> None:
        """Write what is measured anew, and the record; give the target its name."""
        for buffer in self._loaded.model.buffers():
            for name in self._loaded.names.get(id(buffer), ()):
                if not _same_bits(self._out[name], buffer):
                    self._out[name].copy_(buffer)
                    self._out.flush(name)
        masks = {}
        for fqn, row in self.done.items():
            packed, zeros = self._masks[fqn], self._masks[fqn + _ZEROS]
            zeros = zeros if bool(zeros.any()) else zeros[:0]
            known = self._records[fqn]
            masks[fqn] = MaskRecord(
                shape=tuple(known["shape"]),
                roles=tuple(known["roles"]),
                pattern=row.pattern,
                level=row.level,
                packed=packed,
                packed_zeros=zeros,
                aliases=tuple(known["aliases"]),
            )
        SparsityRecord(masks).save(self._work / RECORD)
        (self._work / _MASKS).unlink()
        (self._work / _PROGRESS).unlink()
        os.replace(self._work, self._target)

    def _resume(self, found: dict[str, Any]) -> None:
        for key, value in self._asked.items():
            if found["asked"].get(key) != value:
                raise self._begun_otherwise(
                    f"{key} {found['asked'].get(key)!r} there, now {value!r}"
                )
        self._written, self._records = {*found["written"]}, found["records"]
        rows = [PrunedWeight(**{**row, "notes": tuple(row["notes"])}) for row in found["done"]]
        self.done = {row.fqn: row for row in rows}
        _log.info("%s: going on after %d weights", self._work, len(rows))

    def _begun_otherwise(self, how: str) -> CheckpointError:
        return CheckpointError(
            f"{self._work} was begun otherwise: {how}; repeat the call that began it, "
            "or remove that directory"
        )

    def _save(self) -> None:
        """Write down what is done, whole or not at all."""
        state = {
            "asked": self._asked,
            "written": sorted(self._written),
            "records": self._records,
            "done": [asdict(row) for row in self.done.values()],
        }
        temporary = self._work / f"{_PROGRESS}.new"
        with open(temporary, "w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._work / _PROGRESS)


def _description(part: Any) -> str:
    """A method and its settings, in words that are the same for the same settings."""
    settings = []
    for name, value in sorted(vars(part).items()):
        if isinstance(value, tuple):  # the steps of a pipeline
            settings += [_description(step) for step in value]
        elif isinstance(value, CalibratedSparsifier):
            settings.append(_description(value))
        elif callable(value):
            settings.append(getattr(value, "__qualname__", repr(value)))
        elif isinstance(value, int | float | str) and name not in _COUNTERS:
            settings.append(f"{name}={value!r}")
    return f"{type(part).__name__}({', '.join(settings)})"


def _digest(batches: Sequence[ExampleInputs]) -> str:
    """Stands for calibration data: the same for the same bits."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        leaves, spec = pytree.tree_flatten(call_arguments(batch))
        digest.update(repr(spec).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                data = leaf.detach().cpu().contiguous()
                digest.update(repr((data.dtype, data.shape)).encode())
                digest.update(ctypes.string_at(data.data_ptr(), data.nbytes))
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()
