"""Padding is not data: padded batches give the statistics of the sequences one by one."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fx_sparsity import WandaSparsifier, prune
from fx_sparsity.graph import InputError
from tests.pruning.tiny_methods import Everything

LENGTHS = (3, 9, 6, 1)
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4)
    return LlamaForCausalLM(config).eval()


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL, num_attention_heads=4), add_pooling_layer=False).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return T5ForConditionalGeneration(config).eval()


def sequences(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, 64, (1, length), generator=generator) for length in lengths]


def pad(rows, left, width=12):
    """(ids, mask, positions) of a batch."""
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        place = slice(width - row.shape[1], width) if left else slice(0, row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    mask = mask.long()
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def statistics(model, batches, **options):
    method = Everything()
    _, report = prune(model, method, batches, sequential=False, **options)
    return {row.fqn: shown for row, shown in zip(report.rows, method.shown, strict=True)}, report


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for fqn, (_, one, _) in found.items():
        other = expected[fqn][1]
        assert torch.equal(one.tokens, other.tokens), fqn
        for name in ("squares", "sums", "gram"):
            a, b = getattr(one, name), getattr(other, name)
            if b is not None:
                error = (a - b).norm() / b.norm().clamp(min=1e-9)
                assert error < 1e-5, (fqn, name, float(error))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("make", [llama, bert])
def test_a_padded_batch_counts_as_its_sequences(make, left, observed, monkeypatch):
    if observed:
        refuse_graphs(monkeypatch)
    ids, mask, positions = pad(sequences(), left)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    alone = [
        {"input_ids": row, "attention_mask": torch.ones_like(row)}
        | {"position_ids": torch.arange(row.shape[1])[None]}
        for row in sequences()
    ]
    found, report = statistics(make(), [batch])
    expected, _ = statistics(make(), alone)
    assert all(int(shown[1].tokens.sum()) == sum(LENGTHS) for shown in found.values())
    assert_alike(found, expected)
    assert not any("padding" in note for row in report.rows for note in row.notes)


def refuse_graphs(monkeypatch):
    import fx_sparsity.pruning.batches as batches
    from fx_sparsity.graph import CaptureError

    def refuse(*args):
        raise CaptureError("no graph for this test")

    monkeypatch.setattr(batches, "capture_graphs", refuse)


@pytest.mark.parametrize("widths", [(12, 10), (12, 12)])
def test_the_two_sides_of_a_model_have_masks_of_their_own(widths):
    asked, answered = sequences((3, 9, 6)), sequences((5, 2, 8))
    ids, mask, _ = pad(asked, False, widths[0])
    decoded, decoder_mask, _ = pad(answered, False, widths[1])
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoded,
        "decoder_attention_mask": decoder_mask,
    }
    alone = [
        {
            "input_ids": one,
            "attention_mask": torch.ones_like(one),
            "decoder_input_ids": other,
            "decoder_attention_mask": torch.ones_like(other),
        }
        for one, other in zip(asked, answered, strict=True)
    ]
    found, expected = (
        {fqn: shown for fqn, shown in made[0].items() if "relative" not in fqn}  # of no token
        for made in (statistics(t5(), [batch]), statistics(t5(), alone))
    )
    assert_alike(found, expected)
    tokens = {fqn: int(shown[1].tokens.sum()) for fqn, shown in found.items()}
    assert tokens["decoder.block.0.layer.1.EncDecAttention.k.weight"] == 18
    assert tokens["decoder.block.0.layer.1.EncDecAttention.q.weight"] == 15


def test_what_is_pruned_is_what_the_sequences_say():
    """Sequential pruning of a padded batch has the masks of the unpadded sequences."""
    ids, mask, _ = pad(sequences(), False)
    masks = []
    for batches in (
        [{"input_ids": ids, "attention_mask": mask}],
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in sequences()],
    ):
        method = WandaSparsifier()
        prune(llama(), method, batches, {"object_type": {"linear": "2:4"}})
        masks.append({name: method.get_mask(name) for name in method.names})
    same = [bool((masks[0][name] == masks[1][name]).float().mean() > 0.999) for name in masks[0]]
    assert all(same)


def test_token_weights_take_the_place_of_the_batch_s_own_mask():
    ids, mask, _ = pad(sequences(), False)
    wide = mask[:, None, None, :].bool().expand(-1, 1, 12, -1)
    wide = wide & torch.ones(12, 12, dtype=torch.bool).tril()
    batch = {"input_ids": ids, "attention_mask": wide}
    _, report = statistics(llama(), [batch])
    row = report["model.layers.0.mlp.up_proj.weight"]
    assert row.tokens == ids.numel()
    assert any("4 dimensions: pass token_weights" in note for note in row.notes)
    found, report = statistics(llama(), [batch], token_weights=[mask])
    assert report["model.layers.0.mlp.up_proj.weight"].tokens == sum(LENGTHS)
    expected, _ = statistics(llama(), [{"input_ids": ids, "attention_mask": mask}])
    assert_alike(found, expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([torch.ones(4, 12), torch.ones(4, 12)], "expected one for each of 1 batches, found 2"),
        ([torch.ones(4)], r"shape \[batch, tokens\]"),
        ([torch.full((4, 12), 0.5)], "zeros and ones"),
    ],
)
def test_token_weights_that_do_not_fit_are_refused(weights, message):
    model, (ids, _, _) = llama(), pad(sequences(), False)
    with pytest.raises(InputError, match=message):
        prune(model, WandaSparsifier(), [{"input_ids": ids}], "2:4", token_weights=weights)


def test_inputs_without_axes_of_tokens_are_told(monkeypatch):
    refuse_graphs(monkeypatch)  # of a graph, padding is followed to its experts
    torch.manual_seed(0)
    config = MixtralConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=4, num_local_experts=4
    )
    ids, mask, _ = pad(sequences(), False)
    _, report = statistics(
        MixtralForCausalLM(config).eval(), [{"input_ids": ids, "attention_mask": mask}]
    )
    for row in report.rows:
        said = any(note.startswith("padding counts: ") for note in row.notes)
        assert said == ("experts" in row.fqn), row


class Conv(nn.Module):
    """Reads tokens along its last axis."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(64, 16), nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, input_ids, attention_mask=None):
        return self.conv(self.table(input_ids).mT)


def test_positional_masks_and_convolutions():
    ids, mask, _ = pad(sequences(), False)
    _, report = statistics(Conv().eval(), [(ids, mask)])
    assert report["table.weight"].tokens == sum(LENGTHS)
    assert report["conv.weight"].tokens == ids.numel()
    assert any("a conv does not show" in note for note in report["conv.weight"].notes)
