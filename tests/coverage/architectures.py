"""Small models of many architectures, from configurations with random weights.

Widths are such that matrices outweigh norms and biases, as they do in the real models.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn

VOCABULARY, WIDTH = 512, 256
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "max_position_embeddings": 64,
}
WAV = {
    "vocab_size": 32,
    **{k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")},
    "conv_dim": [128, 128],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def tokens(length=16):
    return {"input_ids": torch.randint(3, VOCABULARY, (2, length))}


def pair():
    return {**tokens(), "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 8))}


def image():
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def sound():
    return {"input_values": torch.randn(1, 800)}


def spectrum():
    return {
        "input_features": torch.randn(1, 8, 32),
        "decoder_input_ids": torch.randint(0, VOCABULARY, (1, 8)),
    }


# name -> (family, class prefix, class suffix, configuration, inputs)
TRANSFORMERS = {
    "llama": ("decoder", "Llama", "ForCausalLM", GROUPED, tokens),
    "mistral": ("decoder", "Mistral", "ForCausalLM", GROUPED, tokens),
    "qwen2": ("decoder", "Qwen2", "ForCausalLM", GROUPED, tokens),
    "qwen3": ("decoder", "Qwen3", "ForCausalLM", {**GROUPED, "head_dim": 64}, tokens),
    "gemma2": ("decoder", "Gemma2", "ForCausalLM", {**GROUPED, "head_dim": 64}, tokens),
    "phi": ("decoder", "Phi", "ForCausalLM", TEXT, tokens),
    "phi3": ("decoder", "Phi3", "ForCausalLM", {**GROUPED, "pad_token_id": 0}, tokens),
    "gpt2": (
        "decoder",
        "GPT2",
        "LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
        },
        tokens,
    ),
    "gpt_neox": ("decoder", "GPTNeoX", "ForCausalLM", TEXT, tokens),
    "gptj": (
        "decoder",
        "GPTJ",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "rotary_dim": 16,
        },
        tokens,
    ),
    "opt": (
        "decoder",
        "OPT",
        "ForCausalLM",
        {
            **{k: v for k, v in TEXT.items() if k != "intermediate_size"},
            "ffn_dim": 4 * WIDTH,
            "word_embed_proj_dim": WIDTH,
        },
        tokens,
    ),
    "bloom": (
        "decoder",
        "Bloom",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "n_layer": 2,
            "n_head": 4,
        },
        tokens,
    ),
    "falcon": (
        "decoder",
        "Falcon",
        "ForCausalLM",
        {k: v for k, v in TEXT.items() if k != "intermediate_size"},
        tokens,
    ),
    "mpt": (
        "decoder",
        "Mpt",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
        },
        tokens,
    ),
    "olmo2": ("decoder", "Olmo2", "ForCausalLM", GROUPED, tokens),
    "cohere": ("decoder", "Cohere", "ForCausalLM", GROUPED, tokens),
    "mixtral": (
        "mixture of experts",
        "Mixtral",
        "ForCausalLM",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        tokens,
    ),
    "qwen3_moe": (
        "mixture of experts",
        "Qwen3Moe",
        "ForCausalLM",
        {**GROUPED, **EXPERTS, "moe_intermediate_size": 128, "head_dim": 64},
        tokens,
    ),
    "olmoe": ("mixture of experts", "Olmoe", "ForCausalLM", {**GROUPED, **EXPERTS}, tokens),
    "gpt_oss": (
        "mixture of experts",
        "GptOss",
        "ForCausalLM",
        {**GROUPED, "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        tokens,
    ),
    "deepseek_v3": (
        "mixture of experts",
        "DeepseekV3",
        "ForCausalLM",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 128,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "first_k_dense_replace": 1,
        },
        tokens,
    ),
    "mamba": (
        "state space",
        "Mamba",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "state_size": 4,
        },
        tokens,
    ),
    "mamba2": (
        "state space",
        "Mamba2",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 64,
            "n_groups": 1,
            "chunk_size": 8,
        },
        tokens,
    ),
    "rwkv": (
        "state space",
        "Rwkv",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "attention_hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
        },
        tokens,
    ),
    "bert": ("encoder", "Bert", "ForMaskedLM", TEXT, tokens),
    "roberta": ("encoder", "Roberta", "ForMaskedLM", {**TEXT, "pad_token_id": 1}, tokens),
    "distilbert": (
        "encoder",
        "DistilBert",
        "ForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "hidden_dim": 2 * WIDTH,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
        tokens,
    ),
    "albert": ("encoder", "Albert", "ForMaskedLM", {**TEXT, "embedding_size": 128}, tokens),
    "deberta_v2": ("encoder", "DebertaV2", "ForMaskedLM", TEXT, tokens),
    "mpnet": ("encoder", "MPNet", "ForMaskedLM", TEXT, tokens),
    "modernbert": (
        "encoder",
        "ModernBert",
        "ForMaskedLM",
        {**TEXT, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
        tokens,
    ),
    "t5": (
        "encoder-decoder",
        "T5",
        "ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_ff": 2 * WIDTH,
            "d_kv": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        pair,
    ),
    "bart": ("encoder-decoder", "Bart", "ForConditionalGeneration", SEQ2SEQ, pair),
    "whisper": (
        "speech",
        "Whisper",
        "ForConditionalGeneration",
        {
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
            **SPECIAL,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
        },
        spectrum,
    ),
    "wav2vec2": ("speech", "Wav2Vec2", "ForCTC", WAV, sound),
    "hubert": ("speech", "Hubert", "ForCTC", WAV, sound),
    "vit": ("vision", "ViT", "ForImageClassification", VISION, image),
    "dinov2": (
        "vision",
        "Dinov2",
        "ForImageClassification",
        {k: v for k, v in VISION.items() if k != "intermediate_size"},
        image,
    ),
    "beit": ("vision", "Beit", "ForImageClassification", VISION, image),
    "swin": (
        "vision",
        "Swin",
        "ForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 128,
            "depths": [1, 1],
            "num_heads": [4, 4],
            "window_size": 4,
        },
        image,
    ),
    "convnext": (
        "vision",
        "ConvNext",
        "ForImageClassification",
        {"hidden_sizes": [128, 256], "depths": [1, 1], "num_stages": 2},
        image,
    ),
    "resnet": (
        "vision",
        "ResNet",
        "ForImageClassification",
        {"embedding_size": 128, "hidden_sizes": [512, 1024], "depths": [1, 1]},
        image,
    ),
    "segformer": (
        "vision",
        "Segformer",
        "ForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [128, 256],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [4, 4],
            "decoder_hidden_size": 256,
        },
        image,
    ),
    "gemma": ("decoder", "Gemma", "ForCausalLM", {**GROUPED, "head_dim": 64}, tokens),
    "glm": ("decoder", "Glm", "ForCausalLM", {**GROUPED, **SPECIAL, "head_dim": 64}, tokens),
    "granite": ("decoder", "Granite", "ForCausalLM", GROUPED, tokens),
    "nemotron": ("decoder", "Nemotron", "ForCausalLM", GROUPED, tokens),
    "smollm3": ("decoder", "SmolLM3", "ForCausalLM", {**GROUPED, **SPECIAL}, tokens),
    "stablelm": ("decoder", "StableLm", "ForCausalLM", GROUPED, tokens),
    "starcoder2": ("decoder", "Starcoder2", "ForCausalLM", {**GROUPED, **SPECIAL}, tokens),
    "gpt_neo": (
        "decoder",
        "GPTNeo",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "window_size": 16,
        },
        tokens,
    ),
    "codegen": (
        "decoder",
        "CodeGen",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "rotary_dim": 16,
        },
        tokens,
    ),
    "xglm": (
        "decoder",
        "XGLM",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "ffn_dim": 2 * WIDTH,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
        },
        tokens,
    ),
    "biogpt": ("decoder", "BioGpt", "ForCausalLM", TEXT, tokens),
    "qwen2_moe": (
        "mixture of experts",
        "Qwen2Moe",
        "ForCausalLM",
        {
            **GROUPED,
            **EXPERTS,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
        },
        tokens,
    ),
    "granitemoe": (
        "mixture of experts",
        "GraniteMoe",
        "ForCausalLM",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        tokens,
    ),
    "phimoe": (
        "mixture of experts",
        "Phimoe",
        "ForCausalLM",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        tokens,
    ),
    "jamba": (
        "state space",
        "Jamba",
        "ForCausalLM",
        {
            **GROUPED,
            **SPECIAL,
            **EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 16,
        },
        tokens,
    ),
    "falcon_mamba": (
        "state space",
        "FalconMamba",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "state_size": 4,
        },
        tokens,
    ),
    "recurrent_gemma": (
        "state space",
        "RecurrentGemma",
        "ForCausalLM",
        {
            **{k: v for k, v in TEXT.items() if k != "max_position_embeddings"},
            "num_hidden_layers": 3,
            "lru_width": WIDTH,
            "head_dim": 64,
            "num_key_value_heads": 1,
            "attention_window_size": 16,
        },
        tokens,
    ),
    "electra": ("encoder", "Electra", "ForMaskedLM", {**TEXT, "embedding_size": 128}, tokens),
    "mobilebert": (
        "encoder",
        "MobileBert",
        "ForMaskedLM",
        {
            **TEXT,
            "embedding_size": 128,
            "intra_bottleneck_size": 128,
            "true_hidden_size": 128,
        },
        tokens,
    ),
    "squeezebert": (
        "encoder",
        "SqueezeBert",
        "ForSequenceClassification",
        {**TEXT, "embedding_size": WIDTH},
        tokens,
    ),
    "fnet": (
        "encoder",
        "FNet",
        "ForSequenceClassification",
        {k: v for k, v in TEXT.items() if k != "num_attention_heads"},
        tokens,
    ),
    "xlnet": (
        "encoder",
        "XLNet",
        "LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 2 * WIDTH,
        },
        tokens,
    ),
    "esm": (
        "encoder",
        "Esm",
        "ForMaskedLM",
        {**TEXT, "pad_token_id": 0, "mask_token_id": 1},
        tokens,
    ),
    "pegasus": ("encoder-decoder", "Pegasus", "ForConditionalGeneration", SEQ2SEQ, pair),
    "marian": (
        "encoder-decoder",
        "Marian",
        "MTModel",
        {**SEQ2SEQ, "pad_token_id": 0, "decoder_start_token_id": 0},
        pair,
    ),
    "mbart": ("encoder-decoder", "MBart", "ForConditionalGeneration", SEQ2SEQ, pair),
    "mt5": (
        "encoder-decoder",
        "MT5",
        "ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_ff": 2 * WIDTH,
            "d_kv": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        pair,
    ),
    "prophetnet": (
        "encoder-decoder",
        "ProphetNet",
        "ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "encoder_ffn_dim": 2 * WIDTH,
            "decoder_ffn_dim": 2 * WIDTH,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        pair,
    ),
    "wavlm": ("speech", "WavLM", "ForCTC", WAV, sound),
    "sew": ("speech", "SEW", "ForCTC", {**WAV, "squeeze_factor": 2}, sound),
    "data2vec_audio": ("speech", "Data2VecAudio", "ForCTC", WAV, sound),
    "vits": (
        "speech",
        "Vits",
        "Model",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "flow_size": 64,
            "spectrogram_bins": 33,
            "upsample_initial_channel": 64,
            "upsample_rates": [4, 4],
            "upsample_kernel_sizes": [8, 8],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
            "prior_encoder_num_flows": 2,
            "posterior_encoder_num_wavenet_layers": 2,
            "depth_separable_channels": 2,
            "use_stochastic_duration_prediction": False,
        },
        tokens,
    ),
    "deit": ("vision", "DeiT", "ForImageClassification", VISION, image),
    "bit": (
        "vision",
        "Bit",
        "ForImageClassification",
        {"embedding_size": 64, "hidden_sizes": [128, 256], "depths": [1, 1], "num_groups": 32},
        image,
    ),
    "regnet": (
        "vision",
        "RegNet",
        "ForImageClassification",
        {"embedding_size": 64, "hidden_sizes": [256, 512], "depths": [1, 1], "groups_width": 64},
        image,
    ),
    "mobilenet_v2": ("vision", "MobileNetV2", "ForImageClassification", {"image_size": 32}, image),
    "efficientnet": (
        "vision",
        "EfficientNet",
        "ForImageClassification",
        {
            "image_size": 32,
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "hidden_dim": 1280,
        },
        image,
    ),
    "poolformer": (
        "vision",
        "PoolFormer",
        "ForImageClassification",
        {"hidden_sizes": [64, 128, 128, 256], "depths": [1, 1, 1, 1]},
        image,
    ),
    "mobilevit": (
        "vision",
        "MobileViT",
        "ForImageClassification",
        {"image_size": 64},
        lambda: {"pixel_values": torch.randn(1, 3, 64, 64)},
    ),
    "levit": (
        "vision",
        "Levit",
        "ForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [128, 192, 256],
            "depths": [1, 1, 1],
            "num_attention_heads": [2, 3, 4],
            "key_dim": [16, 16, 16],
        },
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
    ),
    "focalnet": (
        "vision",
        "FocalNet",
        "ForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 128,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        image,
    ),
}


def clip():
    config = transformers.CLIPConfig(
        text_config={**TEXT, **SPECIAL}, vision_config=VISION, projection_dim=128
    )
    return transformers.CLIPModel(config), {**tokens(), **image()}


def llava():
    config = transformers.LlavaConfig(
        text_config={**GROUPED, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=2,
        vision_feature_layer=-1,
    )
    text = torch.cat([torch.full((2, 16), 2), tokens(8)["input_ids"]], 1)
    return transformers.LlavaForConditionalGeneration(config), {
        "input_ids": text,
        **image(),
    }


class Sequence(nn.Module):
    """A recurrent network with a head."""

    def __init__(self, kind, **options):
        super().__init__()
        self.recurrent = kind(256, 256, batch_first=True, **options)
        self.head = nn.Linear(256 * (1 + self.recurrent.bidirectional), 32)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


class Attention(nn.Module):
    """Attention with packed and with separate projections."""

    def __init__(self):
        super().__init__()
        self.packed = nn.MultiheadAttention(128, 4, batch_first=True)
        self.separate = nn.MultiheadAttention(128, 4, kdim=96, vdim=96, batch_first=True)

    def forward(self, x, y):
        x = self.packed(x, x, x, need_weights=False)[0]
        return self.separate(x, y, y)[0]


class Convolutions(nn.Module):
    """Every dimension, grouped, dilated, transposed, with padding modes."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(32, 64, 3, padding="same", groups=2)
        self.two = nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular", dilation=1)
        self.three = nn.Conv3d(64, 32, 3, padding=1)
        self.up1 = nn.ConvTranspose1d(64, 64, 2, stride=2)
        self.up2 = nn.ConvTranspose2d(64, 64, 2, stride=2, groups=2)
        self.up3 = nn.ConvTranspose3d(32, 32, 2, stride=2)

    def forward(self, x):
        x = self.up1(self.one(x))
        x = self.up2(self.two(x.unflatten(2, (4, -1))))
        return self.up3(self.three(x.unflatten(3, (4, -1))))


class Tables(nn.Module):
    """Embeddings and bags in every mode, and a bilinear interaction."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 32, padding_idx=0)
        self.bags = nn.ModuleList(
            [nn.EmbeddingBag(100, 32, mode=m) for m in ("sum", "mean", "max")]
        )
        self.interact = nn.Bilinear(32, 32, 16)

    def forward(self, indices):
        bags = sum(bag(indices) for bag in self.bags)
        return self.interact(bags, self.table(indices[:, 0]))


def encoder(**options):
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(256, 4, 512, batch_first=True, **options), 2
    )


# name -> (model, inputs)
TORCH = {
    "LSTM": lambda: (Sequence(nn.LSTM, bidirectional=True), (torch.randn(3, 5, 256),)),
    "GRU": lambda: (Sequence(nn.GRU), (torch.randn(3, 5, 256),)),
    "RNN": lambda: (Sequence(nn.RNN), (torch.randn(3, 5, 256),)),
    "MultiheadAttention": lambda: (Attention(), (torch.randn(2, 6, 128), torch.randn(2, 6, 96))),
    "TransformerEncoder": lambda: (encoder(), (torch.randn(2, 6, 256),)),
    "Transformer": lambda: (
        nn.Transformer(256, 4, 1, 1, 512, batch_first=True),
        (torch.randn(2, 6, 256), torch.randn(2, 4, 256)),
    ),
    "convolutions": lambda: (Convolutions(), (torch.randn(2, 32, 16),)),
    "tables": lambda: (Tables(), (torch.randint(1, 100, (6, 4)),)),
}
MULTIMODAL = {"clip": clip, "llava": llava}
NAMES = {
    **{name: entry[0] for name, entry in TRANSFORMERS.items()},
    **dict.fromkeys(MULTIMODAL, "multimodal"),
    **dict.fromkeys(TORCH, "torch.nn"),
}
"""Every architecture's name -> its family."""


def make(name):
    """A seeded model in eval mode, its positional and its keyword inputs."""
    torch.manual_seed(0)
    if name in TORCH:
        model, args = TORCH[name]()
        return model.eval(), args, {}
    if name in MULTIMODAL:
        model, kwargs = MULTIMODAL[name]()
    else:
        _, prefix, suffix, settings, inputs = TRANSFORMERS[name]
        config = getattr(transformers, f"{prefix}Config")(**settings)
        model, kwargs = getattr(transformers, prefix + suffix)(config), inputs()
    return model.eval(), (), kwargs
