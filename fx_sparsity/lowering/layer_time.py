"""How long the layer of a weight takes when it is lowered, before the model is pruned."""

import statistics
from collections.abc import Sequence

from torch import Tensor

from fx_sparsity.graph.weight_map import WeightSite
from fx_sparsity.lowering import timing
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.pruning.costs import COSTS


def layer_milliseconds(
    site: WeightSite, values: Sequence[Tensor], tokens: int, model_bytes: int
) -> list[float] | None:
    """Milliseconds of one call of a linear layer with each of several values as its weight.

    Each counts as `lower` would choose for it: the fastest packing that is smaller than dense and
    was faster here beyond the noise, else dense. Gains are measured in turns with dense, so times
    are one dense time, the median of all that were measured, over the gain. What was measured is
    kept, see `timing`.

    Args:
        site: of the weight.
        values: of its shape; the first is dense.
        tokens: rows of activations in a call.
        model_bytes: of all weights of the model.

    Returns:
        None where no kernel is for such a weight.
    """
    if site.kind != "linear" or sorted(site.roles) != ["in", "out"]:
        return None
    turned = site.roles[0] == "in"
    layers = [DenseLinear(value.t() if turned else value) for value in values]
    if not layers[0].takes(values[0].dtype):
        return None
    table = timing.read_table()
    known = set(table)
    dense: list[float] = []
    gains: list[float] = []
    for layer in layers:
        fitting, _ = layer.candidates()
        timed = timing.measure(
            layer,
            {name: form for name, form in fitting.items() if form.nbytes < layer.nbytes},
            (tokens,),
            input_dtype=layer.weight.dtype,
            model_bytes=model_bytes,
            table=table,
        )
        found = [timing_of[tokens] for timing_of in timed.values()]
        dense += [one.dense_us for one in found]
        gains.append(max([1.0, *(one.gain for one in found if one.faster)]))
    if measured := {case: one for case, one in table.items() if case not in known}:
        timing.write_table(measured)
    if not dense:
        return None
    return [statistics.median(dense) / 1000 / gain for gain in gains]


COSTS.layer_time = layer_milliseconds
