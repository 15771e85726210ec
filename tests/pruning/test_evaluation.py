"""Scores of models: against transformers' own loss, and against torch."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fx_sparsity.graph import InputError
from fx_sparsity.pruning import Evaluation, agreement, cosine, perplexity


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()


def nats_alone(model, ids):
    """Nats of all tokens but the first of one sequence, by the model's own loss; and how many."""
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1), ids.shape[1] - 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batching_change_no_perplexity(llama, side):
    torch.manual_seed(0)
    lengths, width = (5, 9, 7), 9
    sequences = [torch.randint(64, (1, n)) for n in lengths]
    parts = [nats_alone(llama, ids) for ids in sequences]
    wanted = math.exp(sum(nats for nats, _ in parts) / sum(count for _, count in parts))
    ids, mask = torch.full((3, width), 3), torch.zeros(3, width, dtype=torch.int64)
    for row, found in enumerate(sequences):
        n = found.shape[1]
        place = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, place], mask[row, place] = found[0], 1
    batches = [{"input_ids": ids[:2], "attention_mask": mask[:2]}]
    batches += [{"input_ids": ids[2:], "attention_mask": mask[2:]}]
    llama.train()
    found = perplexity(batches)(llama)
    assert llama.training
    llama.eval()
    assert found == pytest.approx(wanted, rel=1e-4)
    assert perplexity(sequences)(llama) == pytest.approx(wanted, rel=1e-5)


def test_labels_are_shifted_and_may_be_left_out(llama):
    ids = torch.randint(64, (2, 8))
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        wanted = math.exp(float(llama(input_ids=ids, labels=labels).loss))
    assert perplexity([{"input_ids": ids, "labels": labels}])(llama) == pytest.approx(wanted)


def test_perplexity_says_what_it_cannot_read(llama):
    with pytest.raises(InputError, match="at least one batch"):
        perplexity([])
    with pytest.raises(InputError, match="an iterable of batches"):
        perplexity({"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
    with pytest.raises(InputError, match="no token to predict"):
        perplexity([torch.zeros(1, 1, dtype=torch.int64)])(llama)
    with pytest.raises(InputError, match="expected token ids"):
        perplexity([torch.zeros(1, 4)])(nn.Linear(4, 4))
    with pytest.raises(InputError, match="batch 0: expected logits"):
        perplexity([torch.zeros(1, 4, dtype=torch.int64)])(nn.EmbeddingBag(4, 4))


def test_agreement_and_cosine_against_torch():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5), torch.randn(32, 6)
    same, near = agreement(model, [x[:20], x[20:]]), cosine(model, [x[:20], x[20:]])
    assert same(model) == 1
    assert near(model) == pytest.approx(1)
    other = nn.Linear(6, 5)
    with torch.no_grad():
        a, b = model(x), other(x)
    assert same(other) == pytest.approx((a.argmax(1) == b.argmax(1)).float().mean().item())
    assert near(other) == pytest.approx(nn.functional.cosine_similarity(a, b).mean().item())
    assert (same.better, near.better) == ("higher", "higher")


def test_an_evaluation_has_a_direction_and_gives_a_number():
    assert Evaluation(lambda model: torch.tensor(3), "lower")(None) == 3.0
    assert not Evaluation(lambda model: 0, "lower").meets(math.nan, 1.0)
    with pytest.raises(ValueError, match='"higher" or "lower", found \'up\''):
        Evaluation(lambda model: 0, "up")
    with pytest.raises(TypeError, match="a function of a model"):
        Evaluation(0.5, "lower")
    with pytest.raises(TypeError, match="score: expected a single number, found NoneType"):
        Evaluation(lambda model: None, "lower")(None)
