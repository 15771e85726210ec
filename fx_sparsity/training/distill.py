"""Distillation: a pruned model learns to give out what the dense one does (arXiv 1503.02531)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.example_inputs import ExampleInputs, call_arguments
from fx_sparsity.pruning.graph_blocks import block_of
from fx_sparsity.pruning.padding import Padding, read_padding
from fx_sparsity.pruning.reconstruction import relative_loss
from fx_sparsity.sparsifier.utils import fqn_to_module
from fx_sparsity.sparsifier.wrappers import unwrapped

Compare = Literal["kl", "relative"]
_TOKENS = 256  # whose probabilities are held at a time


class DistillationError(FxSparsityError, ValueError):
    """A model and its teacher do not match; nothing was trained."""


class Distilled(NamedTuple):
    """One batch, compared.

    Attributes:
        loss: a scalar, float32: the mean over the tokens that count.
        outputs: what the model returned.
        tokens: how many count.
    """

    loss: Tensor
    outputs: Any
    tokens: int


class Distillation:
    """A loss for any loop: how far what a model gives out is from what its teacher does.

    Called with a batch it runs both, the teacher without gradients. Tokens that the batch's
    `attention_mask` (or `decoder_attention_mask`) calls padding count for nothing.

    Args:
        model: learns; masked or squashed, or wrapped for several devices.
        teacher: does not; in eval mode. It shares no parameter with the model.
        compare: `"kl"`: the outputs are logits, and what is compared is the Kullback-Leibler
            divergence of the model's probabilities from the teacher's, times the temperature's
            square. `"relative"`: they are embeddings, and it is the squared error of each token
            over the square of what it should be (of two unit vectors: 2 - 2 x their cosine).
        temperature: that logits are divided by.
        read: what a model returns -> the tensor to compare, tokens first and channels last. By
            default its `logits`, or else the first floating tensor in it.
        hidden: FQNs of modules, present in both, whose outputs are compared, too, relatively; or
            `"blocks"`, the repeated blocks that hold pruned weights, such as the model's layers.
            `pruned` names these weights.
        pruned: FQNs of weights; read for `hidden="blocks"` alone.
        hidden_share: of the loss that is the mean over hidden outputs.
        autocast: dtype in which both models compute, such as `torch.bfloat16`; None for their own.

    Raises:
        DistillationError: the pair cannot be one, whatever the batches are.
        ValueError: a temperature or a share that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        compare: Compare = "kl",
        temperature: float = 1.0,
        read: Callable[[Any], Tensor] | None = None,
        hidden: Sequence[str] | Literal["blocks"] = (),
        pruned: Iterable[str] = (),
        hidden_share: float = 0.5,
        autocast: torch.dtype | None = None,
    ) -> None:
        if compare not in ("kl", "relative"):
            raise ValueError(f'compare: expected "kl" or "relative", found {compare!r}')
        if not temperature > 0:
            raise ValueError(f"temperature: expected more than 0, found {temperature!r}")
        if not 0 <= hidden_share <= 1:
            raise ValueError(f"hidden_share: expected a share in [0, 1], found {hidden_share!r}")
        _check_pair(model, teacher)
        self.model, self.teacher = model, teacher
        self.compare, self.temperature, self.autocast = compare, temperature, autocast
        self.hidden_share = hidden_share
        self._read = read or main_output
        paths = _blocks(model, pruned) if hidden == "blocks" else list(hidden)
        self.hidden = {path: _both(model, teacher, path) for path in paths}

    def __call__(self, batch: ExampleInputs) -> Distilled:
        """Compare one batch.

        Args:
            batch: arguments of a call: a tuple, a dict or a tensor.

        Raises:
            DistillationError: the two do not give out the same shapes, it says where; or there is
                one class alone, which has no divergence.
        """
        args, kwargs = call_arguments(batch)
        padding = read_padding(unwrapped(self.model), batch)
        device = next((t.device.type for t in pytree.tree_leaves(batch) if _is_tensor(t)), "cpu")
        casting = nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)
        with casting:
            with torch.no_grad(), _outputs(b for _, b in self.hidden.values()) as wanted:
                taught = self._read(self.teacher(*args, **kwargs))
            with _outputs(a for a, _ in self.hidden.values()) as found:
                outputs = self.model(*args, **kwargs)
        given = self._read(outputs)
        _check_shapes("the output", given, taught)
        self._check_classes(given)
        keep = padding.find(given.shape[:-1], decoder=True)
        tokens = given.shape[:-1].numel() if keep is None else int(keep.sum())
        loss = self._loss(given, taught, keep)
        if self.hidden:
            losses = [
                self._hidden_loss(path, found.get(a), wanted.get(b), padding)
                for path, (a, b) in self.hidden.items()
            ]
            share = self.hidden_share
            loss = (1 - share) * loss + share * torch.stack(losses).mean()
        return Distilled(loss, outputs, tokens)

    def _check_classes(self, given: Tensor) -> None:
        if self.compare == "kl" and (given.ndim < 2 or given.shape[-1] < 2):
            raise DistillationError(
                "the output: expected logits of two classes or more, found shape "
                f'{tuple(given.shape)}; choose compare="relative", or with read= what to compare: '
                "of a single logit x, torch.stack([x, torch.zeros_like(x)], -1)"
            )
        if not given.ndim:
            raise DistillationError(
                "the output: expected channels, found a scalar, such as a loss; say with read= "
                "what to compare"
            )

    def _loss(self, given: Tensor, taught: Tensor, keep: Tensor | None) -> Tensor:
        if self.compare == "relative":
            return relative_loss(given, taught, keep)
        return kl_divergence(given, taught, keep, self.temperature)

    def _hidden_loss(
        self, path: str, given: Tensor | None, taught: Tensor | None, padding: Padding
    ) -> Tensor:
        if given is None or taught is None:
            who = "model" if given is None else "teacher"
            raise DistillationError(
                f"hidden: the {who} did not call {path!r}, or it gave out no floating tensor; "
                "choose modules that the model calls"
            )
        _check_shapes(f"what {path!r} gives out", given, taught)
        return relative_loss(given, taught, padding.find(given.shape[:-1], decoder=True))


def main_output(outputs: Any) -> Tensor:
    """The tensor that matters of what a model returns: `logits`, else the first floating one.

    Raises:
        DistillationError: there is none.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    for value in (logits, getattr(outputs, "logits", None), *pytree.tree_leaves(outputs)):
        if _is_tensor(value) and value.is_floating_point():
            return value
    raise DistillationError(
        f"expected a model that returns logits or another floating tensor, found "
        f"{type(outputs).__name__}; say with read= what to compare"
    )


def kl_divergence(
    found: Tensor, wanted: Tensor, keep: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Mean over tokens of KL(softmax(wanted / T) || softmax(found / T)) x T^2, float32.

    Probabilities are made of a few tokens at a time, and the gradient with them: beside the two
    tensors there is only the gradient, in the dtype of `found`, in memory.

    Args:
        found: [..., classes], logits of any floating dtype.
        wanted: of that shape; no gradient goes there.
        keep: boolean, [...]: which tokens count; None for all.
        temperature: T.
    """
    if keep is None:
        found, wanted = found.flatten(0, -2), wanted.flatten(0, -2)
    else:
        keep = keep.to(found.device)
        found, wanted = found[keep], wanted[keep]
    if not len(found):
        return found.float().sum()  # no token counts: zero, with a gradient of zeros
    total: Tensor = _KLDivergence.apply(found, wanted, temperature)
    return total / len(found)


class _KLDivergence(torch.autograd.Function):
    """Sum over tokens, and its gradient at once."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(found)
        total = torch.zeros((), device=found.device)
        parts = (tensor.split(_TOKENS) for tensor in (found, wanted, gradient))
        for given, taught, into in zip(*parts, strict=True):
            log_p = (taught.float() / temperature).log_softmax(-1)
            log_q = (given.float() / temperature).log_softmax(-1)
            p = log_p.exp()
            total += torch.where(p == 0, 0, p * (log_p - log_q)).sum()
            into.copy_((log_q.exp_() - p) * temperature)
        ctx.save_for_backward(gradient)
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


@contextmanager
def _outputs(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Module -> the first floating tensor of what it last gave out, of calls inside of `with`."""
    found: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, _: Any, outputs: Any) -> None:
        leaves = pytree.tree_leaves(outputs)
        value = next((t for t in leaves if _is_tensor(t) and t.is_floating_point()), None)
        if value is not None:
            found[module] = value

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_pair(model: nn.Module, teacher: nn.Module) -> None:
    if unwrapped(model) is unwrapped(teacher):
        raise DistillationError(
            "teacher: this is the model itself; keep a copy of the dense one, as "
            "copy.deepcopy(model) before it is pruned"
        )
    taught = {_place(tensor) for tensor in teacher.parameters()}
    shared = [name for name, tensor in model.named_parameters() if _place(tensor) in taught]
    if shared:
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise DistillationError(
            f"{shared[0]}{more}: the teacher has this very tensor, and would be trained with the "
            "model; give it a copy"
        )
    noisy = [m for m in teacher.modules() if m.training and not any(m.children())]
    if noisy:  # not the outermost alone, which may be a wrapper around a model in eval mode
        raise DistillationError(
            "teacher: in training mode, where dropout and batch norms blur what it gives out; call "
            "teacher.eval()"
        )
    kinds = [
        next((t.device for t in m.parameters()), torch.device("cpu")) for m in (model, teacher)
    ]
    if kinds[0].type != kinds[1].type:
        raise DistillationError(
            f"teacher: on {kinds[1]}, but the model is on {kinds[0]}; move one of them"
        )


def _place(tensor: Tensor) -> int:
    """Where a tensor's values lie; of one that has none, which one it is."""
    return id(tensor) if tensor.is_meta or not tensor.numel() else tensor.data_ptr()


def _blocks(model: nn.Module, pruned: Iterable[str]) -> list[str]:
    around = block_of(unwrapped(model), pruned)
    blocks = list(dict.fromkeys(path for fqn, path in around.items() if path != fqn))
    if not blocks:
        raise DistillationError(
            'hidden: "blocks" found no repeated blocks around pruned weights; name the modules to '
            "compare"
        )
    return blocks


def _both(model: nn.Module, teacher: nn.Module, path: str) -> tuple[nn.Module, nn.Module]:
    found = [fqn_to_module(unwrapped(m), path) for m in (model, teacher)]
    for module, who in zip(found, ("model", "teacher"), strict=True):
        if not isinstance(module, nn.Module):
            raise DistillationError(f"hidden: the {who} has no module {path!r}")
    return found[0], found[1]


def _check_shapes(what: str, given: Tensor, taught: Tensor) -> None:
    if given.shape == taught.shape:
        return
    if given.shape[:-1] == taught.shape[:-1]:
        raise DistillationError(
            f"{what} has {given.shape[-1]} channels (of a language model: its vocabulary), the "
            f"teacher's {taught.shape[-1]}; give a teacher that was made alike"
        )
    raise DistillationError(
        f"{what} is of shape {tuple(given.shape)}, the teacher's of {tuple(taught.shape)}; give a "
        "teacher that was made alike"
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
