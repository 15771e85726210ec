"""Experts: padding that is routed, tokens sent to all of them, and those that met few."""

import logging

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import fx_sparsity as fxs
from fx_sparsity.pruning.pruner import CalibrationError
from tests.pruning.test_padding import (
    assert_alike,
    llama,
    pad,
    refuse_graphs,
    sequences,
    statistics,
)
from tests.pruning.tiny_methods import Everything

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "num_key_value_heads": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}


def mixtral(implementation="grouped_mm", experts=4, chosen=2, layers=1):
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": layers}
    config = MixtralConfig(**sizes, num_local_experts=experts, num_experts_per_tok=chosen)
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    return model


def gpt_oss():
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model = GptOssForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):
            torch.nn.init.normal_(parameter)
    return model


def qwen():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES, head_dim=8, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=4
    )
    return Qwen3MoeForCausalLM(config).eval()


def deepseek():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **(SIZES | LATENT),
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
    )
    return DeepseekV3ForCausalLM(config).eval()


def batched():
    return mixtral("batched_mm")


MODELS = [mixtral, batched, gpt_oss, qwen, deepseek]


def routed(found):
    return {fqn: shown for fqn, shown in found.items() if ".experts." in fqn}


@pytest.mark.parametrize("make", [mixtral, batched, gpt_oss, deepseek])
def test_padding_that_is_routed_counts_for_nothing(make):
    ids, mask, positions = pad(sequences(), left=True)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    alone = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in sequences()]
    found, report = statistics(make(), [batch])
    expected, _ = statistics(make(), alone)
    assert len(routed(found)) >= 2
    assert_alike(found, expected)
    assert not any("padding" in note for row in report.rows for note in row.notes)


def met_by_all(model, fqn, tokens):
    """What every expert would meet, by running its block's experts on all tokens alike.

    Returns:
        [experts, tokens, in] of a weight, in float64.
    """
    path, _, attribute = fqn.rpartition(".")
    block = model.get_submodule(path)
    met = []

    def note(module, args, kwargs):
        met.append(args[0].reshape(-1, args[0].shape[-1]).double())

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(tokens)
    handle.remove()
    (x,) = met
    count = block.gate_up_proj.shape[0]
    if attribute == "gate_up_proj":
        return x.expand(count, -1, -1)
    inner = []
    for expert in range(count):
        weight = block.gate_up_proj[expert].detach().double()
        if hasattr(block, "gate_up_proj_bias"):  # of gpt-oss, which stores [in, out]
            both = x @ weight + block.gate_up_proj_bias[expert].detach().double()
            gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
            inner.append((up + 1) * gate * (gate * 1.702).sigmoid())
        else:
            gate, up = (x @ weight.T).chunk(2, -1)
            inner.append(torch.nn.functional.silu(gate) * up)
    return torch.stack(inner)


@pytest.mark.parametrize("make", MODELS)
def test_every_expert_meets_every_token(make):
    model, ids = make(), torch.cat(sequences((7, 7)))
    found, report = statistics(model, [{"input_ids": ids}], all_experts=True)
    usual, _ = statistics(make(), [{"input_ids": ids}])
    for fqn, (_, stats, _) in found.items():
        if ".experts." not in fqn:
            assert_alike({fqn: found[fqn]}, {fqn: usual[fqn]})  # is routed as ever
            continue
        x = met_by_all(make(), fqn, ids)
        assert stats.tokens.tolist() == [ids.numel()] * len(x)
        assert report[fqn].tokens == ids.numel() * len(x)
        gram = x.mT @ x
        assert torch.allclose(stats.gram.double(), gram, rtol=1e-4, atol=1e-5 * gram.abs().max())


def test_of_padded_batches_it_meets_every_token_that_counts():
    ids, mask, positions = pad(sequences(), True)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    alone = [{"input_ids": row} for row in sequences()]
    found, _ = statistics(mixtral(), [batch], all_experts=True)
    expected, _ = statistics(mixtral(), alone, all_experts=True)
    assert_alike(found, expected)


def test_where_the_choice_does_not_divide_the_experts_all_meet_the_same():
    model, ids = mixtral(experts=5, chosen=2), torch.cat(sequences((7, 7)))
    found, _ = statistics(model, [{"input_ids": ids}], all_experts=True)
    for _, stats, _ in routed(found).values():
        assert stats.tokens.tolist() == [2 * ids.numel()] * 5


def test_the_batches_go_on_as_the_router_sends_them():
    """Sequential pruning with a level of zero leaves the model; later layers see what they did."""
    ids = torch.cat(sequences((7, 7)))
    shown = []
    for options in ({}, {"all_experts": True}):
        method = Everything()
        _, report = fxs.prune(mixtral(layers=2), method, [{"input_ids": ids}], **options)
        shown.append({r.fqn: s[1] for r, s in zip(report.rows, method.shown, strict=True)})
    fqn = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(shown[0][fqn].gram, shown[1][fqn].gram)


@pytest.mark.parametrize("observed", [True, False])
def test_without_a_router_it_is_refused(observed, monkeypatch):
    if observed:
        refuse_graphs(monkeypatch)
    model = mixtral() if observed else llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {"input_ids": torch.cat(sequences((7, 7)))}
    with pytest.raises(CalibrationError, match="all_experts: no router"):
        fxs.prune(model, fxs.WandaSparsifier(), [batch], "2:4", all_experts=True)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_experts_that_met_few_tokens_are_told_once_in_numbers(caplog):
    ids = torch.cat(sequences((7, 7)))
    found, _ = statistics(mixtral(), [{"input_ids": ids}])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model, report = fxs.prune(
            mixtral(), fxs.WandaSparsifier(), [{"input_ids": ids}], "2:4", sequential=False
        )
    few = 0
    for row in report.rows:
        if ".experts." in row.fqn:
            tokens = found[row.fqn][1].tokens.tolist()
            width = 32 if "gate_up" in row.fqn else 48
            assert (row.groups, row.fewest) == (4, min(tokens))
            assert row.few == sum(n < width for n in tokens)
            few += 1
    assert few == 2
    (message,) = [m for m in caplog.messages if "met few" in m or "fewer" in m]
    assert "all_experts=True" in message
    assert message in str(report)
    _, whole = fxs.prune(
        mixtral(), fxs.WandaSparsifier(), [{"input_ids": ids}], "2:4", all_experts=True
    )
    assert {row.fewest for row in whole.rows if row.groups > 1} == {14}


class Poisoning(torch.nn.Module):
    """Experts whose inputs mix tokens, so that nobody can tell which of them were padding."""

    def __init__(self):
        super().__init__()
        self.table, self.router = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 4, bias=False)
        self.experts = torch.nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids).flatten(0, 1)
        chosen = self.router(x).topk(1).indices[:, 0]
        mixed = x - x.mean(0)
        return torch.bmm(mixed.unsqueeze(1), self.experts[chosen])


def test_where_tokens_mix_before_the_experts_padding_counts_and_that_is_said():
    torch.manual_seed(0)
    ids, mask, _ = pad(sequences(), left=False)
    found, report = statistics(Poisoning(), [{"input_ids": ids, "attention_mask": mask}])
    assert int(found["experts"][1].tokens.sum()) == ids.numel()
    assert any(note.startswith("padding counts: ") for note in report["experts"].notes)
