"""`prepare` as a pass that Inductor calls with each graph that it compiles.

The class that Inductor wants of a pass is private, as all of `torch._inductor` is; there is no
public way to put a pass into it.
"""

from typing import Any

from torch import fx, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from fx_sparsity.graph import MappingLike, prepare
from fx_sparsity.graph.compiled import is_dynamo_body, is_of_dynamo, source_target
from fx_sparsity.graph.sources import compiled_source
from fx_sparsity.sparsifier import BaseSparsifier, MaskError


class InductorPrepare(CustomGraphPass):
    """Masks on the weights of a model while Inductor compiles it; the model stays as it is.

    Give `options` to `torch.compile`. Afterwards the sparsifier works as after `prepare`: what
    `step` computes is seen by what is compiled, for inference and for training, and `squash(model,
    sparsifier)` bakes it in.

    Masks reach compiled code as inputs, as weights do. So no cache of torch holds any, and none
    has to know them: a cached result serves whatever masks there are, in any process. This needs
    the pass to run before torch looks into its caches, which `options` says; where masks were
    added later they would be constants, and `uuid` is None, so that torch caches nothing then.

    Args:
        model: that is compiled, or called by what is.
        sparsifier: as `prepare` takes it; it is bound to `model`.
        mapping: as `prepare` takes it.
    """

    def __init__(
        self, model: nn.Module, sparsifier: BaseSparsifier, mapping: MappingLike | None = None
    ) -> None:
        self.model = model
        self.sparsifier = sparsifier
        self.mapping = mapping

    @property
    def options(self) -> dict[str, Any]:
        """What `torch.compile(options=...)` takes, to be merged with other options."""
        # Releases without the setting have no other time.
        early = {"pre_grad_pass_timing": "early"} if hasattr(config, "pre_grad_pass_timing") else {}
        return {"pre_grad_custom_pass": self, **early}

    def __call__(self, graph: fx.Graph) -> None:
        """Mask the weights of a graph.

        Raises:
            MaskError: it is none that Dynamo has made, or none of its weights are of the model.
            MappingError: as `prepare`.
        """
        gm = graph.owning_module
        assert gm is not None
        if is_dynamo_body(gm):
            return  # its weights are masked in the graph around it
        if not is_of_dynamo(gm):
            raise MaskError(
                "InductorPrepare was called with a graph that is not Dynamo's: it goes into "
                "pre_grad_custom_pass of torch.compile(options=...), and into no other place. A "
                "program is masked by fx_sparsity.prepare before it is compiled"
            )
        placeholders = graph.find_nodes(op="placeholder")
        weights = [node for node in placeholders if source_target(node) is not None]
        source = compiled_source(gm, (), self.model)
        if weights and not any(map(source, weights)):
            raise MaskError(
                f"{source_target(weights[0])}: no weight of this graph is one of the "
                f"{type(self.model).__name__} that InductorPrepare was given; give the module "
                "that is compiled"
            )
        prepare(gm, self.sparsifier, mapping=self.mapping, model=self.model)

    def uuid(self) -> None:
        """None: see above."""
