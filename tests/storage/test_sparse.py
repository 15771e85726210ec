"""Loading into modules that keep their weights compressed."""

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.kernels import SparseLinear
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag


class Ranker(nn.Module):
    def __init__(self):
        super().__init__()
        self.users = nn.Embedding(64, 32, padding_idx=3)
        self.items = nn.EmbeddingBag(64, 32, mode="sum")
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
        self.blocks = nn.Linear(32, 64)
        self.dense = nn.Linear(64, 64)
        self.hooked = nn.Linear(64, 64)
        self.tied = nn.Linear(32, 64)
        self.tied.weight = self.users.weight

    def forward(self, x):
        h = self.mlp(self.users(x).sum(1) + self.items(x))
        return self.hooked(self.dense(self.blocks(h))) + self.tied(h)


def sparse_ranker():
    model = Ranker().eval()
    mapping = (
        fxs.SparsityMapping()
        .set_module_name("mlp.0", "unstructured 70%")
        .set_module_name("mlp.2", "2:4")
        .set_module_name("blocks", "block:16x1 50%")
        .set_module_name("hooked", "unstructured 70%")
        .set_module_name("items", "rows 50%")
        .set_module_name("users", "rows 50%")
    )
    sparsifier = fxs.WeightNormSparsifier()
    x = torch.randint(64, (5, 4))
    fxs.prepare(model, sparsifier, (x,), mapping)
    sparsifier.step()
    model, _ = fxs.squash(model, sparsifier)
    return model, x


@pytest.mark.parametrize("meta", [False, True])
def test_sparse_weights_stay_compressed(tmp_path, meta):
    model, x = sparse_ranker()
    fxs.save(model, tmp_path / "f")
    if meta:
        with fxs.parameters_on_meta():
            other = Ranker().eval()
    else:
        other = Ranker().eval()
    other.hooked.register_forward_hook(lambda *_: None)
    report = fxs.load_sparse(tmp_path / "f", other, check=True)
    assert report == {
        "users.weight": "dense: tied to another weight",
        "items.weight": "RowPrunedEmbeddingBag",
        "mlp.0.weight": "SparseLinear",
        "mlp.2.weight": "SparseLinear",
        "blocks.weight": "SparseLinear",
        "hooked.weight": "dense: its module has hooks",
    }
    assert isinstance(other.items, RowPrunedEmbeddingBag)
    assert isinstance(other.mlp[0], SparseLinear)
    assert torch.equal(other.mlp[2].dense_weight(), model.mlp[2].weight)
    assert other.tied.weight is other.users.weight
    assert not any(p.is_meta for p in other.parameters())
    torch.testing.assert_close(other(x), model(x))


def test_an_embedding_alone(tmp_path):
    model = nn.Sequential(nn.Embedding(64, 32, padding_idx=3))
    with torch.no_grad():
        model[0].weight[::2] = 0
    fxs.save(model, tmp_path / "f")
    other = nn.Sequential(nn.Embedding(64, 32, padding_idx=3))
    assert fxs.load_sparse(tmp_path / "f", other) == {"0.weight": "RowPrunedEmbedding"}
    assert isinstance(other[0], RowPrunedEmbedding)
    x = torch.arange(64)
    assert torch.equal(other(x), model(x))


def test_what_does_not_fit_changes_nothing(tmp_path):
    model, _ = sparse_ranker()
    state = model.state_dict()
    del state["dense.bias"]
    fxs.save(state, tmp_path / "f")
    other = Ranker()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="dense.bias: not in the file"):
        fxs.load_sparse(tmp_path / "f", other)
    after = other.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
