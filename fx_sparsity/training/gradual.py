"""Gradual magnitude pruning."""

from fx_sparsity.training.method import TrainingMethod


class GradualMagnitude(TrainingMethod):
    """Keeps what has the largest norm, at a level that a schedule moves (arXiv 1710.01878).

    Masks are computed anew from the weights beneath, so that a weight may come back, as it was
    when it went but for what the optimizer's momentum and weight decay did since. From `end` on
    the masks are frozen, and what they keep is fine-tuned.

    Args:
        every: see `TrainingMethod`.
        begin: see `TrainingMethod`.
        end: see `TrainingMethod`.
        norm: see `WeightNormSparsifier`.
    """

    returns = True
