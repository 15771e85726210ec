"""Recovery: what pruning took from a model, won back from the dense one, masks frozen."""

import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fx_sparsity.graph.example_inputs import ExampleInputs, InputError
from fx_sparsity.masks.bits import pack_bits
from fx_sparsity.pruning.batches import check_iterable
from fx_sparsity.pruning.held_out import spread
from fx_sparsity.sparsifier.hold import hold
from fx_sparsity.sparsifier.mask import Mask
from fx_sparsity.sparsifier.record import SparsityRecord, masks_checksum
from fx_sparsity.sparsifier.target import MaskError
from fx_sparsity.sparsifier.wrappers import unwrapped
from fx_sparsity.training.distill import Distillation, DistillationError
from fx_sparsity.training.low_rank import Adapters, LowRank
from fx_sparsity.training.recovery import Recovery, RecoveryReport
from fx_sparsity.training.recovery_steps import Checkpoint, RecoverySteps

Train = Literal["kept", "vectors", "all"] | LowRank | Collection[str]


def recover(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[ExampleInputs],
    record: SparsityRecord | None = None,
    recovery: Recovery | None = None,
    *,
    train: Train = "kept",
    checkpoint: str | Path | None = None,
    save_every: int = 50,
    progress: bool = False,
) -> tuple[nn.Module, RecoveryReport]:
    """Train what a pruned model keeps until it gives out what the dense one does; masks stay.

    AdamW without weight decay, gradients of at most norm 1. Weights of other dtypes than float32
    are trained as float32 copies. The model runs in the modes that it is in: `model.eval()` before
    keeps dropout and batch norms still.

    Args:
        model: squashed, or with live masks; changed in place.
        teacher: the dense model, in eval mode.
        batches: of inputs, as `prune` takes them; held in memory. Padding counts for nothing.
        record: what `squash` returned; None where masks are live.
        recovery: how; `Recovery()` by default.
        train: `"kept"`: the pruned weights and all norms and biases (parameters of one dimension);
            `"vectors"`: norms and biases alone; `"all"`: every parameter; `LowRank`: adapters on
            the pruned weights of a squashed model, merged at the end; or FQNs of parameters.
        checkpoint: a file for what has been done. The same call goes on from there, also in a new
            process, to the very same result; the file stays when all is done.
        save_every: steps between writes of it.
        progress: whether to tell how far it has come.

    Returns:
        The model, and what was done.

    Raises:
        DistillationError: model and teacher do not match, nothing is pruned or there is nothing to
            train, or the checkpoint is of another call: told before anything is changed. Or the
            loss of a step is not finite; the model is as after the step before, adapters are off.
        MaskError: the record is of another model, or masks are on.
        InputError: no batches, or too few to hold one out.
    """
    recovery = recovery or Recovery()
    if save_every < 1:
        raise ValueError(f"save_every: expected at least one, found {save_every!r}")
    pruned = _pruned(model, record)
    distillation = Distillation(
        model,
        teacher,
        compare=recovery.compare,
        temperature=recovery.temperature,
        hidden=recovery.hidden,
        pruned=pruned,
        autocast=recovery.autocast,
    )
    used, judged = _split(batches, recovery.held_out)
    _mean_loss(distillation, used[:1])  # a pair that does not match is told before any change
    file = None
    if checkpoint is not None:
        settings = {
            **asdict(recovery),
            "autocast": str(recovery.autocast),
            "batches": [len(used), len(judged), _checksum(used)],
            "train": repr(train),
            "masks": masks_checksum(*map(pack_bits, pruned.values())),
        }
        file = Checkpoint(Path(checkpoint), save_every, settings)
    state = None if file is None else file.read()
    before = _mean_loss(distillation, judged)
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    adapters = _adapters(model, record, train, recovery.seed)
    try:
        chosen = _choose(model, pruned, train) if adapters is None else adapters.parameters
        for parameter in required:
            parameter.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        steps = RecoverySteps(distillation, used, chosen, recovery)
        if record is not None and adapters is None:
            steps.held = hold(steps.optimizer, model, record)
        if state is not None:
            steps.load_state_dict(state)
        steps.run(file, progress)
        memory = steps.memory()
        if adapters is not None:
            adapters.merge()
    finally:
        if adapters is not None:
            adapters.remove()
        for parameter, before_it in required.items():
            parameter.requires_grad_(before_it)
    after = _mean_loss(distillation, judged)
    report = RecoveryReport(
        rows=tuple(steps.done),
        before=before,
        after=after,
        trained=sum(_kept(name, p, pruned) for name, p in chosen.items()),
        seconds=steps.seconds,
        memory=memory,
    )
    return model, report


def _pruned(model: nn.Module, record: SparsityRecord | None) -> dict[str, Tensor]:
    """FQN of each pruned weight -> its mask, boolean.

    Raises:
        DistillationError: there is none.
        MaskError: masks are on, and a record was given, too.
    """
    live = {
        _plain(name): module.keep
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, Mask)
    }
    if record is not None and live:
        raise MaskError(f"{next(iter(live))} is still masked; squash first, or pass no record")
    found = live if record is None else {name: entry.keep for name, entry in record.items()}
    if not found:
        raise DistillationError(
            "the model has no live mask: pass the record that squash returned, so that its zeros "
            "stay"
        )
    if all(bool(keep.all()) for keep in found.values()):
        raise DistillationError("the masks keep everything; call sparsifier.step() first")
    return found


def _plain(name: str) -> str:
    """FQN of a weight from that of its mask, or of the original beneath."""
    return re.sub(r"parametrizations\.(\w+)\.(0|original)$", r"\1", name)


def _adapters(model: nn.Module, record: SparsityRecord | None, train: Train, seed: int) -> Any:
    if not isinstance(train, LowRank):
        return None
    if record is None:
        raise MaskError(
            "train: low-rank adapters go on plain weights; call squash(model, sparsifier), and "
            "pass its record"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Adapters(model, record, train)


def _choose(model: nn.Module, pruned: Collection[str], train: Train) -> dict[str, nn.Parameter]:
    """FQN -> parameter that is to be trained.

    Raises:
        DistillationError: a name that the model does not have, or nothing that can be trained.
    """
    parameters = {
        _plain(name): parameter
        for name, parameter in unwrapped(model).named_parameters()
        if parameter.is_floating_point()
    }
    if train == "kept":
        names = [n for n, p in parameters.items() if n in pruned or p.ndim < 2]
    elif train == "vectors":
        names = [name for name, parameter in parameters.items() if parameter.ndim < 2]
    elif train == "all":
        names = list(parameters)
    elif isinstance(train, str | LowRank):
        raise ValueError(
            f'train: expected "kept", "vectors", "all", LowRank or FQNs, found {train!r}'
        )
    else:
        names = _first_names(model, parameters, train)
    if not names:
        raise DistillationError(f"train: the model has nothing of {train!r} to train")
    return {name: parameters[name] for name in names}


def _first_names(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], names: Collection[str]
) -> list[str]:
    """The name that the model first has for each of them: a tied weight has several.

    Raises:
        DistillationError: a name that the model does not have.
    """
    first = {id(parameter): name for name, parameter in parameters.items()}
    found = {
        _plain(name): first[id(parameter)]
        for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False)
        if id(parameter) in first
    }
    if unknown := [name for name in names if name not in found]:
        raise DistillationError(f"train: the model has no floating parameter {unknown[0]!r}")
    return list(dict.fromkeys(found[name] for name in names))


def _split(
    batches: Iterable[ExampleInputs], held_out: float
) -> tuple[list[ExampleInputs], list[ExampleInputs]]:
    """Those to train on, and those to judge by."""
    check_iterable(batches)
    found = list(batches)
    if len(found) < (2 if held_out else 1):
        raise InputError(
            f"batches: expected at least {2 if held_out else 1}, found {len(found)}"
            f"{'; held_out=0 trains on all' if found else ''}"
        )
    places = spread(len(found), held_out) if held_out else set()
    used = [batch for place, batch in enumerate(found) if place not in places]
    return used, [found[place] for place in sorted(places)]


def _checksum(batches: Collection[ExampleInputs]) -> int:
    """CRC-32 of all tensors."""
    value = 0
    for tensor in tree_leaves(list(batches)):
        if isinstance(tensor, Tensor):
            plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            value = zlib.crc32(plain.numpy().data, value)
    return value


@torch.no_grad()
def _mean_loss(distillation: Distillation, batches: Collection[ExampleInputs]) -> float | None:
    """Over all tokens, the model in eval mode; None without batches."""
    model = distillation.model
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found = [distillation(batch) for batch in batches]
    finally:
        for module, training in modes.items():
            module.training = training
    tokens = sum(one.tokens for one in found)
    return sum(float(one.loss) * one.tokens for one in found) / tokens if tokens else None


def _kept(name: str, parameter: Tensor, pruned: Mapping[str, Tensor]) -> int:
    return int(pruned[name].sum()) if name in pruned else parameter.numel()
