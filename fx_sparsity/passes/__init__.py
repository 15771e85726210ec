"""The verbs as passes: for anyone's `PassManager`, for programs, and in Inductor."""

from fx_sparsity.graph.passes import AnnotateWeights
from fx_sparsity.passes.inductor import InductorPrepare
from fx_sparsity.passes.verbs import Lower, Prepare, Squash, Step, Unprepare, VerbPass

__all__ = [
    "AnnotateWeights",
    "InductorPrepare",
    "Lower",
    "Prepare",
    "Squash",
    "Step",
    "Unprepare",
    "VerbPass",
]
