"""Small models that between them use weights in every way that the tests need."""

import torch
from torch import nn
from torch.nn import functional as F


class Recommender(nn.Module):
    """Embedding bags, an interaction by bmm of activations, and MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.tables = nn.ModuleList([nn.EmbeddingBag(40, 8, mode="sum") for _ in range(3)])
        self.top = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, dense, indices):
        x = self.bottom(dense)
        rows = torch.stack([x, *(t(indices[:, i]) for i, t in enumerate(self.tables))], 1)
        return self.top(torch.cat([x, torch.bmm(rows, rows.transpose(1, 2)).flatten(1)], 1))


class ConvNet(nn.Module):
    """Plain, grouped and transposed convolutions, batch norm, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 8)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.up(F.relu(self.grouped(x))).mean((2, 3)))


class TiedLanguageModel(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(F.relu(self.block(self.embed(tokens))))


class Bare(nn.Module):
    """Parameters without modules: stored transposed, packed, in three dimensions, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(16, 8))
        self.transposed = nn.Parameter(torch.randn(16, 8))
        self.packed = nn.Parameter(torch.randn(24, 8))
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.heads = nn.Parameter(torch.randn(8, 2, 4))
        self.table = nn.Parameter(torch.randn(20, 8))
        self.position = nn.Parameter(torch.randn(3, 8))
        self.unused = nn.Parameter(torch.randn(4, 4))
        self.gain = nn.Parameter(torch.randn(8))

    def forward(self, x, index):
        x = F.linear(x, self.plain) @ self.transposed
        query, key, value = self.packed.chunk(3, 0)
        x = F.linear(x, query) + F.linear(x, key) + x @ value.t()
        x = torch.bmm(x.unsqueeze(0).expand(2, -1, -1), self.experts).sum(0)
        x = torch.einsum("bd,dhk->bhk", x, self.heads).reshape(-1, 8)
        return (x + F.embedding(index, self.table) + self.position) * self.gain


class Root(nn.Linear):
    """A user's subclass, and the root of its own model."""


MODELS = {
    "recommender": lambda: (Recommender(), (torch.randn(5, 12), torch.randint(40, (5, 3, 2)))),
    "convnet": lambda: (ConvNet(), (torch.randn(2, 4, 8, 8),)),
    "tied": lambda: (TiedLanguageModel(), (torch.randint(32, (2, 5)),)),
    "bare": lambda: (Bare(), (torch.randn(3, 8), torch.randint(20, (3,)))),
    "root": lambda: (Root(8, 4), (torch.randn(2, 8),)),
    "sequential": lambda: (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
        (torch.randn(3, 8),),
    ),
}


def make(name):
    """A fresh, seeded (model in eval mode, example inputs)."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.eval(), inputs


def make_bert():
    """A BERT of two layers with random weights, and keyword inputs."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    tokens = torch.randint(64, (2, 8))
    return BertModel(config, add_pooling_layer=False).eval(), {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
    }


class Delegating(nn.Module):
    """Hands attributes that it has not on to its inner module, as peft's wrappers do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["net"], name)

    def forward(self, x):
        return self.net(x)
