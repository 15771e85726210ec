"""How good a model is, in one number: evaluations for `search`."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils import _pytree as pytree

from fx_sparsity.graph.example_inputs import ExampleInputs, InputError
from fx_sparsity.pruning.batches import Batch, check_iterable, read_batches
from fx_sparsity.pruning.effect import output_of
from fx_sparsity.pruning.padding import ENCODER
from fx_sparsity.pruning.undisturbed import buffers_kept, evaluating

_IGNORED = -100
"""A label that counts for nothing, as in `cross_entropy`."""


@dataclass(frozen=True)
class Evaluation:
    """A score of a model, and whether more of it is better.

    Attributes:
        score: of a model, a number. It gets the model in eval mode, and must not change it.
        better: "higher" or "lower".
        name: of the score, for reports.

    Raises:
        ValueError: `better` is neither.
        TypeError: `score` cannot be called.
    """

    score: Callable[[nn.Module], float]
    better: Literal["higher", "lower"]
    name: str = "score"

    def __post_init__(self) -> None:
        if not callable(self.score):
            raise TypeError(f"score: expected a function of a model, found {self.score!r}")
        if self.better not in ("higher", "lower"):
            raise ValueError(f'better: expected "higher" or "lower", found {self.better!r}')

    def __call__(self, model: nn.Module) -> float:
        """The score; NaN where the model gives none.

        Raises:
            TypeError: it is no single number.
        """
        found: Any = self.score(model)
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{self.name}: expected a single number, found {type(found).__name__}"
            ) from error

    def meets(self, found: float, wanted: float) -> bool:
        """Whether a score is as good as is wanted; NaN never is."""
        return found >= wanted if self.better == "higher" else found <= wanted

    def loss(self, found: float) -> float:
        """A score as something of which less is better; infinite for NaN."""
        if math.isnan(found):
            return math.inf
        return -found if self.better == "higher" else found


def perplexity(batches: Iterable[ExampleInputs]) -> Evaluation:
    """Perplexity of a causal language model: exp of the mean nats a token; lower is better.

    Every token but the first of its sequence is predicted from those before it. What the
    `attention_mask` of a batch leaves out is neither predicted nor predicted from, and labels of
    -100 do not count. Batches count by their tokens. Logits are taken in float32.

    Args:
        batches: as `prune` takes them: dicts with `input_ids` [sequences, tokens], or tuples of
            which these are the first; `labels` of that shape, not shifted, take their place.

    Raises:
        InputError: there is no batch, or it is a single one; when it is called, also: no token is
            left to predict, or the model returns no logits [sequences, tokens, classes].
    """
    given = _listed(batches)

    def score(model: nn.Module) -> float:
        nats, tokens = 0.0, 0
        with _running(model):
            for batch in read_batches(model, given):
                logits, labels = _logits(batch, batch.call(model))
                for one, wanted in zip(logits[:, :-1], labels[:, 1:], strict=True):  # less memory
                    counted = int((wanted != _IGNORED).sum())
                    if counted:
                        tokens += counted
                        nats += float(cross_entropy(one.float(), wanted, reduction="sum"))
        if not tokens:
            raise InputError("perplexity: the batches leave no token to predict")
        mean = nats / tokens
        return math.exp(mean) if mean < 700 else mean * math.inf  # NaN stays NaN

    return Evaluation(score, "lower", "perplexity")


def agreement(model: nn.Module, batches: Iterable[ExampleInputs]) -> Evaluation:
    """Share of the largest logits that stay the largest; higher is better, 1 is best.

    What counts is the first floating tensor that the model returns, [..., classes], without scalars
    and padding. In memory is one integer for each place that has a class.

    Args:
        model: dense, in any mode; it is run at once.
        batches: as `prune` takes them.

    Raises:
        InputError: there is no batch, it is a single one, or the model rejects one.
        CalibrationError: the model returns no floating tensor.
    """
    given = _listed(batches)
    dense = [output.argmax(-1) for output in _outputs(model, given)]

    def score(model: nn.Module) -> float:
        found = [output.argmax(-1) for output in _outputs(model, given)]
        same = sum(int((a == b).sum()) for a, b in zip(dense, found, strict=True))
        return same / max(1, sum(classes.numel() for classes in dense))

    return Evaluation(score, "higher", "agreement")


def cosine(model: nn.Module, batches: Iterable[ExampleInputs]) -> Evaluation:
    """Mean cosine of embeddings with those of the dense model; higher is better, 1 is best.

    What counts is the first floating tensor that the model returns, [..., dim], without scalars
    and padding. It is held in memory for all batches.

    Args:
        model: dense, in any mode; it is run at once.
        batches: as `prune` takes them.

    Raises:
        InputError: there is no batch, it is a single one, or the model rejects one.
        CalibrationError: the model returns no floating tensor.
    """
    given = _listed(batches)
    dense = list(_outputs(model, given))

    def score(model: nn.Module) -> float:
        pairs = zip(dense, _outputs(model, given), strict=True)
        cosines = [cosine_similarity(a.double(), b.double(), dim=-1).flatten() for a, b in pairs]
        return float(torch.cat(cosines).mean())

    return Evaluation(score, "higher", "cosine")


def _listed(batches: Iterable[ExampleInputs]) -> list[ExampleInputs]:
    """All batches, at least one."""
    check_iterable(batches)
    found = list(batches)
    if not found:
        raise InputError("batches: expected at least one batch of inputs, found none")
    return found


def _outputs(model: nn.Module, batches: Sequence[ExampleInputs]) -> Iterator[Tensor]:
    """What counts of what a model returns, batch by batch."""
    with _running(model):
        for batch in read_batches(model, batches):
            yield output_of(batch, batch.call(model))


@contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    with evaluating(model), buffers_kept(model), torch.no_grad():
        yield


def _logits(batch: Batch, returned: Any) -> tuple[Tensor, Tensor]:
    """Logits [sequences, tokens, classes], and labels [sequences, tokens] that are not shifted."""
    ids = batch.kwargs["input_ids"] if "input_ids" in batch.kwargs else (*batch.args, None)[0]
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise InputError(
            f"perplexity: batch {batch.number}: expected token ids [sequences, tokens] as "
            "`input_ids` or as the first argument, found none"
        )
    labels: Tensor = batch.kwargs.get("labels", ids)
    keep = batch.padding.keep.get(ENCODER)
    if keep is not None:
        seen = keep.clone()
        seen[:, 1:] &= keep[:, :-1]
        labels = labels.masked_fill(~seen, _IGNORED)
    leaves = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        if leaf.is_floating_point() and leaf.ndim == 3 and leaf.shape[:2] == ids.shape:
            return leaf, labels
    raise InputError(
        f"perplexity: batch {batch.number}: expected logits {[*ids.shape, 'classes']}, found "
        f"{[tuple(leaf.shape) for leaf in leaves]}"
    )
