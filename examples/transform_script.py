"""A model transformation script: take a model, sparsify it, save a file that shrank, load it back.

python examples/transform_script.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import fx_sparsity as fxs


class Ranker(nn.Module):
    """A small recommendation model: two tables and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(20_000, 64)
        self.items = nn.EmbeddingBag(50_000, 64, mode="mean")
        self.mlp = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, user: torch.Tensor, basket: torch.Tensor) -> torch.Tensor:
        """Scores [batch, 1] of users [batch] and their baskets [batch, items]."""
        return self.mlp(torch.cat([self.users(user), self.items(basket)], dim=1))


def main() -> None:
    torch.manual_seed(0)
    model = Ranker().eval()
    inputs = (torch.randint(20_000, (8,)), torch.randint(50_000, (8, 5)))

    # Half the rows of the item table, 2:4 in the MLP; the user table stays dense.
    mapping = (
        fxs.SparsityMapping().set_module_name("items", "rows 50%").set_object_type(nn.Linear, "2:4")
    )
    print(mapping.resolve(fxs.find_weights(model, inputs)), "\n")

    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, mapping)
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    print(fxs.verify(model, record).raise_if_lost(), "\n")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranker.safetensors"
        fxs.save(model, path)
        dense = sum(p.nbytes for p in model.parameters())
        print(f"dense {dense / 1e6:.1f} MB, file {path.stat().st_size / 1e6:.1f} MB")

        loaded = Ranker().eval()
        fxs.load(path, loaded)
    assert torch.equal(loaded(*inputs), model(*inputs))
    print("loaded back: the outputs are the same, bit for bit")


if __name__ == "__main__":
    main()
