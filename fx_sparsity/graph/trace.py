"""A symbolic trace, for what `torch.export` and Dynamo do not show."""

from torch import fx, nn

from fx_sparsity.graph.operators import MODULES


def trace_model(model: nn.Module) -> fx.GraphModule:
    """Trace a model symbolically, with every module opened up but those that the table knows.

    Raises:
        Exception: whatever the model's code raises when it is run on proxies.
    """

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            holds = any(parameter.ndim >= 2 for parameter in m.parameters())
            known = isinstance(m, tuple(MODULES))
            return known or (not holds and super().is_leaf_module(m, module_qualified_name))

    return fx.GraphModule(model, Tracer().trace(model))
