"""What is no weight by its name, codes with their scales, and names that a configuration ties."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fx_sparsity as fxs
from fx_sparsity.checkpoints import Checkpoint, CheckpointError, find_checkpoint_weights
from fx_sparsity.checkpoints.names import why_dense
from fx_sparsity.graph import MappingError
from tests.storage.test_formats import same_bits

FP8 = torch.float8_e4m3fn


def randn(*shape, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def integers(*shape, dtype=torch.int32):
    return torch.randint(-100, 100, shape).to(dtype)


QUANTIZED = {
    "deepseek": {
        "model.layers.0.mlp.down_proj.weight": randn(256, 384, dtype=FP8),
        "model.layers.0.mlp.down_proj.weight_scale_inv": randn(2, 3).float().abs(),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": randn(576, 256, dtype=FP8),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv": randn(5, 2).float().abs(),
    },
    "compressed-tensors": {
        "model.layers.0.mlp.up_proj.weight": randn(64, 64, dtype=FP8),
        "model.layers.0.mlp.up_proj.weight_scale": randn(64, 1).abs(),
        "model.layers.0.mlp.up_proj.input_scale": randn(1),
        "model.layers.1.mlp.up_proj.weight_packed": integers(64, 8),
        "model.layers.1.mlp.up_proj.weight_scale": randn(64, 4),
        "model.layers.1.mlp.up_proj.weight_zero_point": randn(64, 4),
        "model.layers.1.mlp.up_proj.weight_shape": torch.tensor([64, 64]),
        "model.layers.2.mlp.up_proj.weight_packed": integers(64, 32, dtype=torch.uint8),
        "model.layers.2.mlp.up_proj.weight_scale": randn(64, 4, dtype=FP8),
        "model.layers.2.mlp.up_proj.weight_global_scale": randn(1).float(),
    },
    "gptq": {
        "model.layers.0.mlp.up_proj.qweight": integers(8, 64),
        "model.layers.0.mlp.up_proj.qzeros": integers(4, 8),
        "model.layers.0.mlp.up_proj.scales": randn(4, 64).half(),
        "model.layers.0.mlp.up_proj.g_idx": integers(64),
    },
    "awq": {
        "model.layers.0.mlp.up_proj.qweight": integers(64, 8),
        "model.layers.0.mlp.up_proj.qzeros": integers(4, 8),
        "model.layers.0.mlp.up_proj.scales": randn(4, 64).half(),
    },
    "bitsandbytes": {
        "model.layers.0.mlp.up_proj.weight": integers(512, 1, dtype=torch.uint8),
        "model.layers.0.mlp.up_proj.weight.absmax": randn(4, 4),
        "model.layers.0.mlp.up_proj.weight.quant_map": randn(16),
    },
}


@pytest.mark.parametrize("layout", [*QUANTIZED])
def test_what_belongs_to_codes_is_never_changed(layout, tmp_path):
    tensors = {**QUANTIZED[layout], "model.layers.0.mlp.gate_proj.weight": randn(32, 32)}
    save_file(tensors, tmp_path / "a.safetensors")
    report = fxs.sparsify_checkpoint(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "unstructured 50%"
    )
    result = load_file(tmp_path / "b.safetensors")
    for name, tensor in tensors.items():
        masked = name.endswith(".weight") and tensor.is_floating_point()
        assert same_bits(result[name], tensor) == (not masked), name
        if not masked and tensor.ndim == 2 and tensor.is_floating_point():
            assert "codes of a quantized weight" in report[name].reason


@pytest.mark.parametrize("shape", [(256, 384), (576, 192), (100, 130)])
@pytest.mark.parametrize("ranked", ["weight", "model"])
def test_codes_rank_by_the_values_that_they_stand_for(shape, ranked, tmp_path):
    """Blocks of 128 need not divide a weight; a scale may lie in another shard."""
    codes, blocks = randn(*shape, dtype=FP8), [-(-n // 128) for n in shape]
    scale = 2.0 ** torch.arange(blocks[0] * blocks[1]).reshape(blocks)
    (tmp_path / "src").mkdir()
    save_file({"w.weight": codes}, tmp_path / "src" / "1.safetensors")
    save_file({"w.weight_scale_inv": scale}, tmp_path / "src" / "2.safetensors")
    fxs.sparsify_checkpoint(tmp_path / "src", tmp_path / "dst", "unstructured 50%", ranked=ranked)
    kept = load_file(tmp_path / "dst" / "1.safetensors")["w.weight"].float() != 0
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    values = (codes.float() * wide).abs()
    assert values[kept].min() >= values[~kept].max()
    assert kept.count_nonzero() == codes.numel() // 2
    assert torch.equal(load_file(tmp_path / "dst" / "2.safetensors")["w.weight_scale_inv"], scale)


@pytest.mark.parametrize("scale", [(), (1,), (64,), (64, 1), (64, 4), (1, 1)])
def test_scales_of_tensors_rows_and_groups(scale, tmp_path):
    tensors = {"w.weight": randn(64, 64, dtype=FP8), "w.weight_scale": randn(*scale).abs() + 0.1}
    save_file(tensors, tmp_path / "a.safetensors")
    fxs.sparsify_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "2:4")
    result = load_file(tmp_path / "b.safetensors")
    assert (result["w.weight"].float() == 0).sum() >= 2048
    assert same_bits(result["w.weight_scale"], tensors["w.weight_scale"])


def test_codes_whose_scale_does_not_fit_are_refused_by_name(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"w.weight": randn(64, 64, dtype=FP8), "w.weight_scale": randn(3, 7)}, source)
    with pytest.raises(CheckpointError, match=r"^w.weight: codes rank .* w.weight_scale"):
        fxs.sparsify_checkpoint(source, target, "2:4")
    assert not target.exists()
    fxs.sparsify_checkpoint(source, target, {"global": "2:4", "module_name": {"w": None}})


DENSE = {
    "position": [
        *("bert.embeddings.position_embeddings.weight", "transformer.wpe.weight"),
        *("model.decoder.embed_positions.weight", "encoder.pos_embedding", "visual.pos_embed"),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "layers.0.blocks.0.attn.relative_position_bias_table",
        *("blocks.0.attn.rel_pos_h", "deberta.encoder.rel_embeddings.weight"),
        *("visual.positional_embedding", "attention.self.distance_embedding.weight"),
        *("layoutlm.embeddings.x_position_embeddings.weight", "layers.0.self_attn.pos_bias_u"),
    ],
    "routes tokens": [
        *("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        *(
            "model.layers.0.mlp.router.weight",
            "encoder.block.1.layer.1.mlp.router.classifier.weight",
        ),
        *("model.layers.0.mlp.gate.wg.weight", "transformer.blocks.0.ffn.router.layer.weight"),
        *(
            "model.layers.0.feed_forward.router.weight",
            "model.layers.0.mlp.shared_expert_gate.weight",
        ),
        "h.0.moe.gate.wg",
    ],
    "decays": [
        *("backbone.layers.0.mixer.A_log", "blocks.0.att.time_decay", "blocks.0.att.time_faaaa"),
        *("blocks.0.att.time_mix_k", "blocks.0.op.A_logs", "layers.0.log_dt"),
    ],
    "a bias": ["model.layers.0.mlp.experts.gate_up_proj_bias"],
}
MATRICES = [
    *("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"),
    *("model.layers.0.self_attn.q_proj.weight", "encoder.conformer.linear_pos.weight"),
    *(
        "backbone.layers.0.mixer.dt_proj.weight",
        "blocks.0.att.time_maa_w1",
        "deberta.pos_proj.weight",
    ),
    *("layers.0.attn.continuous_position_bias_mlp.0.weight", "to_scale.weight", "lora_A.weight"),
    *("bert.embeddings.token_type_embeddings.weight", "model.layers.0.mlp.experts.3.w1.weight"),
    *("pos_embed.proj.weight", "score.weight", "lm_head.weight", "model.embed_tokens.weight"),
]


def test_what_is_a_matrix_of_a_product_may_be_pruned():
    assert {name: why for name in MATRICES if (why := why_dense(name)) is not None} == {}


@pytest.mark.parametrize("why", [*DENSE])
def test_what_no_pattern_is_meant_for_stays_dense_unless_it_is_named(why, tmp_path):
    tensors = {name: randn(8, 16) for name in [*DENSE[why], "layers.0.up_proj.weight"]}
    source = tmp_path / "a.safetensors"
    save_file(tensors, source)
    report = fxs.sparsify_checkpoint(source, tmp_path / "b.safetensors", "2:4")
    for name in DENSE[why]:
        assert why in report[name].reason
    assert same_bits(load_file(tmp_path / "b.safetensors")[name], tensors[name])
    assert report["layers.0.up_proj.weight"].zeros == 64
    named = {"module_name": {name.removesuffix(".weight"): "2:4" for name in DENSE[why]}}
    report = fxs.sparsify_checkpoint(source, tmp_path / "c.safetensors", named)
    assert {report[name].zeros for name in DENSE[why]} == {64}


def test_the_owner_of_a_weight_does_not_name_its_scales(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file({"w.weight": randn(64, 64, dtype=FP8), "w.weight_scale": randn(64, 4)}, source)
    report = fxs.sparsify_checkpoint(
        source, tmp_path / "b.safetensors", {"module_name": {"w": "2:4"}}
    )
    assert report["w.weight_scale"].pattern is None


# -- tied names ------------------------------------------------------------------------------------


def publish(folder, config, *names):
    folder.mkdir()
    save_file({name: randn(16, 8) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TIED = [
    ({"tie_word_embeddings": True}, "model.embed_tokens.weight", "lm_head"),
    ({"text_config": {"tie_word_embeddings": True}}, "model.embed_tokens.weight", "lm_head"),
    ({"architectures": ["GPT2LMHeadModel"]}, "transformer.wte.weight", "lm_head"),
    ({"architectures": ["GPT2LMHeadModel"]}, "wte.weight", "lm_head"),
    ({"tie_word_embeddings": True}, "shared.weight", "encoder.embed_tokens"),
    (
        {"tie_word_embeddings": True},
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder",
    ),
    (
        {"tie_word_embeddings": True},
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head",
    ),
]


@pytest.mark.parametrize(("config", "table", "head"), TIED)
def test_a_tied_name_is_one_of_its_weight(config, table, head, tmp_path):
    folder = publish(tmp_path / "a", config, table, "model.layers.0.up_proj.weight")
    mapping = {"global": "2:4", "module_name": {head: None}}
    report = fxs.sparsify_checkpoint(folder, tmp_path / "b", mapping)
    assert report[table].reason == f"excluded by name {head!r}"
    mapping = {"module_name": {f"{head}.weight": "rows 25%"}}
    assert fxs.sparsify_checkpoint(folder, tmp_path / "c", mapping)[table].zeros == 32


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"tie_word_embeddings": False}, ["model.embed_tokens.weight"]),
        ({}, ["model.embed_tokens.weight"]),
        ({"tie_word_embeddings": True}, ["a.embed_tokens.weight", "b.embed_tokens.weight"]),
        ({"tie_word_embeddings": True}, ["model.layers.0.up_proj.weight"]),
    ],
)
def test_what_is_not_tied_has_no_other_name(config, names, tmp_path):
    folder = publish(tmp_path / "a", config, *names)
    with pytest.raises(MappingError, match="no weight or owning module 'lm_head'"):
        fxs.sparsify_checkpoint(folder, tmp_path / "b", {"module_name": {"lm_head": "2:4"}})


def test_a_head_in_the_files_is_its_own(tmp_path):
    config, names = {"tie_word_embeddings": True}, ("model.embed_tokens.weight", "lm_head.weight")
    weights = find_checkpoint_weights(Checkpoint(publish(tmp_path / "a", config, *names)))
    assert {site.fqn: site.aliases for site in weights.sites} == dict.fromkeys(names, ())
