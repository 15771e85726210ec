"""What a sparsifier is bound to where only the graph of a `torch.compile` backend is known."""

from collections.abc import Mapping

from torch import Tensor, nn


class Received(nn.Module):
    """The weights that graphs receive as inputs, at the paths that Dynamo noted for them."""

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Take further tensors, by FQN."""
        for fqn, tensor in tensors.items():
            *path, attribute = fqn.split(".")
            module: nn.Module = self
            for name in path:
                if name not in dict(module.named_children()):
                    module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(attribute, tensor)
            else:
                module.register_buffer(attribute, tensor)

    def held(self) -> dict[str, Tensor]:
        """Every tensor, by FQN."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}
