"""Tiny configs of transformers architectures, as a user would write them: the file is the base, and ``hf:`` says what grows."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from mutransfer.family import Family
from mutransfer.proxies.load import load_family

__all__ = ["CONFIGS", "family"]

Config = dict[str, Any]

WORDS: Config = {"vocab_size": 64, "max_position_embeddings": 64}
SPECIAL: Config = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STACK: Config = WORDS | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
GQA: Config = STACK | {"num_key_value_heads": 2}
NORMED: Config = GQA | {"head_dim": 16}
BOTH: Config = WORDS | SPECIAL | {
    "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 1,
}  # fmt: skip
IMAGE: Config = {"image_size": 16, "patch_size": 4, "num_labels": 10}
EXPERTS: Config = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
STAGES: Config = {"num_labels": 10, "image_size": 32}

CONFIGS: dict[str, Config] = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 64},
    "llama": GQA,
    "mixtral": GQA | {"num_local_experts": 4},
    "bert": STACK,
    "vit": STACK | IMAGE,
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2, "vocab_size": 64},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4, "vocab_size": 64},
    "resnet": STAGES | {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "basic"},
    # and more
    "gemma2": NORMED,
    "gemma3_text": NORMED,
    "qwen3": NORMED,
    "qwen2_moe": GQA | EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": NORMED | EXPERTS,
    "deepseek_v3": STACK | {
        "num_key_value_heads": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 64, "n_routed_experts": 8, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16,
    },
    "gpt_oss": NORMED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": WORDS | {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64,
                    "num_hidden_layers": 2},
    "bart": BOTH,
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64, "num_hidden_layers": 2},
    "gpt_neox": STACK,
    "gptj": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 64, "rotary_dim": 8},
    "phi": STACK,
    "phi3": GQA | SPECIAL,
    "olmo2": GQA,
    "cohere": GQA,
    "bloom": {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 64},
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1,
               "vocab_size": 64, "chunk_size": 16},
    "rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "context_length": 64},
    "jamba": GQA | {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "num_hidden_layers": 4,
                    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
                    "use_mamba_kernels": False},
    "falcon_h1": NORMED | {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8,
                          "mamba_chunk_size": 16},
    "swin": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 4, "window_size": 4,
             "num_labels": 10},
    "convnext": STAGES | {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2, "patch_size": 4},
    "dinov2": STACK | IMAGE,
    "whisper": BOTH | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
    "wav2vec2": STACK | SPECIAL | {
        "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 4], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    },
    "deberta-v2": STACK | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    "albert": STACK | {"embedding_size": 32},
    "roberta": STACK | SPECIAL,
    "distilbert": WORDS | {"dim": 64, "hidden_dim": 128, "n_heads": 4, "n_layers": 2},
    "electra": STACK | {"embedding_size": 64},
    "modernbert": STACK | SPECIAL | {"cls_token_id": 1, "sep_token_id": 2},
    "starcoder2": GQA,
    "granite": GQA | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625,
                      "logits_scaling": 8.0},
    "nemotron": GQA,
    "stablelm": GQA,
    "smollm3": GQA | SPECIAL,
    "glm4": NORMED | SPECIAL,
    "pegasus": BOTH,
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "vocab_size": 64},
    "minicpm3": STACK | {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                         "qk_rope_head_dim": 8, "v_head_dim": 16},
    "clip": {
        "architectures": ["CLIPForImageClassification"], "num_labels": 10, "projection_dim": 64,
        "text_config": STACK | {"model_type": "clip_text_model"},
        "vision_config": STACK | IMAGE | {"model_type": "clip_vision_model"},
    },
}  # fmt: skip


def family(kind: str, batch_size: int = 8, **options: Any) -> Family:
    """Return the family of a config, through a file, as ``hf:`` reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(CONFIGS[kind] | {"model_type": kind}))
        return load_family(f"hf:{path}", None, None, batch_size=batch_size, options=options)
