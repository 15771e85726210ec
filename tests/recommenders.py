"""Models of a recommender as torchrec builds them, of its own parts or of ones shaped like these."""

import importlib
import importlib.util
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils import _pytree as pytree


class JaggedTensor:
    """Lists of different lengths, one after another."""

    def __init__(self, values, weights=None, lengths=None):
        self._values, self._weights, self._lengths = values, weights, lengths

    def values(self):
        return self._values

    def weights(self):
        return self._weights

    def lengths(self):
        return self._lengths

    def offsets(self):
        return torch.cat([self._lengths.new_zeros(1), self._lengths.cumsum(0)])


class KeyedJaggedTensor:
    """Lists for each of some features; a pytree whose context is the names of these."""

    def __init__(self, keys, values, weights=None, lengths=None):
        self._keys, self._values, self._weights, self._lengths = keys, values, weights, lengths

    @classmethod
    def from_lengths_sync(cls, keys, values, lengths, weights=None):
        return cls(keys, values, weights, lengths)

    def to_dict(self):
        lengths = self._lengths.view(len(self._keys), -1)
        sizes = lengths.sum(1).tolist()
        for size in sizes:
            torch._check(size >= 0)
        values = self._values.split(sizes)
        weights = [None] * len(sizes) if self._weights is None else self._weights.split(sizes)
        parts = zip(values, weights, lengths, strict=True)
        return {key: JaggedTensor(*part) for key, part in zip(self._keys, parts, strict=True)}


_FIELDS = ("_values", "_weights", "_lengths")
pytree.register_pytree_node(
    KeyedJaggedTensor,
    lambda t: ([getattr(t, name) for name in _FIELDS], t._keys),
    lambda values, keys: KeyedJaggedTensor(keys, *values),
    flatten_with_keys_fn=lambda t: (
        [(pytree.GetAttrKey(name), getattr(t, name)) for name in _FIELDS],
        t._keys,
    ),
    serialized_type_name="tests.recommenders.KeyedJaggedTensor",
)


class KeyedTensor:
    """What bags of all features gave, beside one another."""

    def __init__(self, keys, values):
        self._keys, self._values = keys, values

    def values(self):
        return self._values


class PoolingType(Enum):
    SUM = "sum"
    MEAN = "mean"


@dataclass
class EmbeddingConfig:
    num_embeddings: int
    embedding_dim: int
    name: str
    feature_names: list[str] = field(default_factory=list)


@dataclass
class EmbeddingBagConfig(EmbeddingConfig):
    pooling: PoolingType = PoolingType.SUM


class EmbeddingBagCollection(nn.Module):
    """Bags that are called by keywords, with the offset of the end; features may share a table."""

    def __init__(self, tables, is_weighted=False):
        super().__init__()
        self._tables, self._is_weighted = tables, is_weighted
        self.embedding_bags = nn.ModuleDict(
            {
                t.name: nn.EmbeddingBag(
                    t.num_embeddings,
                    t.embedding_dim,
                    mode=t.pooling.value,
                    include_last_offset=True,
                )
                for t in tables
            }
        )

    def forward(self, features):
        lists = features.to_dict()
        keys, found = [], []
        for table in self._tables:
            for key in table.feature_names:
                f = lists[key]
                pooled = self.embedding_bags[table.name](
                    input=f.values(),
                    offsets=f.offsets(),
                    per_sample_weights=f.weights() if self._is_weighted else None,
                )
                keys.append(key)
                found.append(pooled.float())
        return KeyedTensor(keys, torch.cat(found, 1))


class EmbeddingCollection(nn.Module):
    """Embeddings that are called by the keyword `input`, and are not pooled."""

    def __init__(self, tables):
        super().__init__()
        self._tables = tables
        self.embeddings = nn.ModuleDict(
            {t.name: nn.Embedding(t.num_embeddings, t.embedding_dim) for t in tables}
        )

    def forward(self, features):
        lists = features.to_dict()
        return {
            key: JaggedTensor(
                self.embeddings[table.name](input=lists[key].values()).float(),
                lengths=lists[key].lengths(),
            )
            for table in self._tables
            for key in table.feature_names
        }


IMITATED = SimpleNamespace(
    EmbeddingBagCollection=EmbeddingBagCollection,
    EmbeddingBagConfig=EmbeddingBagConfig,
    EmbeddingCollection=EmbeddingCollection,
    EmbeddingConfig=EmbeddingConfig,
    KeyedJaggedTensor=KeyedJaggedTensor,
    PoolingType=PoolingType,
)
PARTS = ["imitated", *(["torchrec"] if importlib.util.find_spec("torchrec") else [])]
"""Where parts may come from. torchrec wants a fbgemm-gpu-cpu that was built for this torch, such as
1.8 for torch 2.13; where it is not installed its tests are not collected.
"""


def parts(name):
    """The classes, by one of the names of `PARTS`."""
    return IMITATED if name == "imitated" else importlib.import_module("torchrec")


class DLRM(nn.Module):
    """Scores [batch] from dense features [batch, 13], bags, and lists that are not pooled.

    Args:
        rec: classes, see `parts`.
        sizes: rows of the tables `goods` (two features), `shops`, and `history`.
        dim: columns of every table.
        is_weighted: whether the bags have weights; then all are sums.
    """

    def __init__(self, rec, sizes=(500, 100, 300), dim=16, is_weighted=False):
        super().__init__()
        goods, shops, history = sizes
        mean = rec.PoolingType.SUM if is_weighted else rec.PoolingType.MEAN
        self.bags = rec.EmbeddingBagCollection(
            tables=[
                rec.EmbeddingBagConfig(
                    name="goods",
                    num_embeddings=goods,
                    embedding_dim=dim,
                    feature_names=["bought", "seen"],
                    pooling=rec.PoolingType.SUM,
                ),
                rec.EmbeddingBagConfig(
                    name="shops",
                    num_embeddings=shops,
                    embedding_dim=dim,
                    feature_names=["shop"],
                    pooling=mean,
                ),
            ],
            is_weighted=is_weighted,
        )
        self.lists = rec.EmbeddingCollection(
            tables=[
                rec.EmbeddingConfig(
                    name="history",
                    num_embeddings=history,
                    embedding_dim=dim,
                    feature_names=["clicks"],
                )
            ]
        )
        self.bottom = nn.Sequential(nn.Linear(13, dim), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(5 * dim, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense, bags, lists):
        clicks = self.lists(lists)["clicks"].values().view(dense.shape[0], 2, -1).mean(1)
        pooled = self.bags(bags).values()
        return self.top(torch.cat([self.bottom(dense), pooled, clicks], 1)).squeeze(1)


def requests(rec, sizes=(500, 100, 300), size=8, is_weighted=False, seed=0):
    """Arguments of one call of a `DLRM`: bags of 0 to 4 ids, and lists of two."""
    generator = torch.Generator().manual_seed(seed)

    def ids(rows, count):
        return torch.randint(rows, (count,), generator=generator)

    lengths = torch.randint(5, (3, size), generator=generator)
    bought, seen, shop = lengths.sum(1).tolist()
    values = torch.cat([ids(sizes[0], bought + seen), ids(sizes[1], shop)])
    weights = torch.rand(len(values), generator=generator) if is_weighted else None
    make = rec.KeyedJaggedTensor.from_lengths_sync
    bags = make(["bought", "seen", "shop"], values, lengths.flatten(), weights)
    lists = make(["clicks"], ids(sizes[2], 2 * size), torch.full((size,), 2))
    return torch.randn(size, 13, generator=generator), bags, lists
