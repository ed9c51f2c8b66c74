"""What a constructor does is seen in real architectures, and drawn again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mutransfer.initialization import InitTracer, draw_

from ..helpers.watched import saved

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
BODY = SMALL | {"intermediate_size": 128, "num_attention_heads": 4}
IMAGES = {"image_size": 32, "patch_size": 8}
DECODER = BODY | {"num_key_value_heads": 2}
SPEECH = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}),
    "ViTForImageClassification": ("ViTConfig", BODY | IMAGES),
    "T5ForConditionalGeneration": ("T5Config", {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99}),
    "MambaForCausalLM": ("MambaConfig", SMALL | {"state_size": 8}),
    "LlamaForCausalLM": ("LlamaConfig", DECODER | {"pad_token_id": 0}),
}  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "MixtralForCausalLM": ("MixtralConfig", DECODER),
    "BertForMaskedLM": ("BertConfig", BODY),
    "Mamba2ForCausalLM": ("Mamba2Config", SMALL | {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "RwkvForCausalLM": ("RwkvConfig", SMALL | {"context_length": 32}),
    "Gemma2ForCausalLM": ("Gemma2Config", DECODER | {"head_dim": 16}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", DECODER | EXPERTS),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", BODY | LATENT | ROUTED | {"first_k_dense_replace": 1}),
    "FalconH1ForCausalLM": ("FalconH1Config", DECODER | {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16}),
    "OPTForCausalLM": ("OPTConfig", BODY | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "WhisperForConditionalGeneration": ("WhisperConfig", SPEECH | {"vocab_size": 99, "pad_token_id": 1}),
    "CLIPModel": ("CLIPConfig", {"text_config": BODY, "vision_config": BODY | IMAGES}),
    "SwinForImageClassification": ("SwinConfig", {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], **IMAGES}),
    "ConvNextForImageClassification": ("ConvNextConfig", {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "sinusoidal_pos_embds": True},
    ),
    "Dinov2Model": ("Dinov2Config", BODY | IMAGES),
    "Wav2Vec2Model": ("Wav2Vec2Config", BODY),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", DECODER | EXPERTS | {"head_dim": 16}),
    "GptOssForCausalLM": ("GptOssConfig", DECODER | {"num_local_experts": 4, "head_dim": 16}),
}


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_parameter_of_a_real_architecture(name: str) -> None:
    """Tables come out to the bit, zeros where they were, and the mean and std of what is drawn are the constructor's."""
    import transformers

    config, fields = (MODELS | MORE)[name]
    config = getattr(transformers, config)(**fields)
    with FakeTensorMode(allow_non_fake_inputs=True), InitTracer() as watcher:
        fake = getattr(transformers, name)(config)
    inits = watcher.named(fake)
    own, other = getattr(transformers, name)(config), getattr(transformers, name)(config)
    assert inits.keys() == dict(own.named_parameters()).keys()
    for key, weight in own.named_parameters():
        init = saved(inits[key])
        again = torch.empty_like(weight)
        draw_(again, init, 0, key)
        assert torch.equal(weight, other.get_parameter(key)) == init.fixed, key
        assert torch.equal(weight == 0, again == 0), key
        if init.fixed:
            assert torch.equal(weight, again), key
            continue
        std, error = weight.std(correction=0).item(), 8 / math.sqrt(2 * weight.numel()) + 0.01
        assert again.std(correction=0).item() == pytest.approx(std, rel=error), key
        assert again.mean().item() == pytest.approx(weight.mean().item(), abs=8 * std / math.sqrt(weight.numel())), key
        if not init.parts:
            assert init.std == pytest.approx(std, rel=error), key
