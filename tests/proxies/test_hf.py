"""transformers configs as families: what grows, what is built, what it is trained on, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.family import Family
from mutransfer.proxies.data import load_data
from mutransfer.proxies.hf_config import describe_changes, resized
from mutransfer.proxies.load import load_family
from mutransfer.recipe import Scale

COMMON = {"vocab_size": 64, "max_position_embeddings": 64}
STACK = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2} | COMMON
GQA = STACK | {"num_key_value_heads": 2}
BOTH = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_layers": 2, "decoder_layers": 2} | COMMON  # fmt: skip
BOTH_WIDE = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4}  # fmt: skip
LAYERS = {"num_hidden_layers": 2}
WIDE = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4}
WIDE_GQA = WIDE | {"num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Written by hand from the architectures' definitions: the config, its class, what grows with width and with depth.
TABLE: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": (
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 64},
        "GPT2LMHeadModel", {"n_embd": 32, "n_head": 4}, {"n_layer": 2},  # n_inner is None: 4·n_embd
    ),
    "llama": (GQA, "LlamaForCausalLM", WIDE_GQA, LAYERS),
    "mixtral": (GQA | {"num_local_experts": 4}, "MixtralForCausalLM", WIDE_GQA, LAYERS),  # experts stay
    "bert": (STACK, "BertForMaskedLM", WIDE, LAYERS),
    "vit": (STACK | {"image_size": 16, "patch_size": 4, "num_labels": 10}, "ViTForImageClassification", WIDE, LAYERS),
    "t5": (
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2, "vocab_size": 64},
        "T5ForConditionalGeneration", {"d_model": 32, "d_ff": 64, "num_heads": 4}, {"num_layers": 2, "num_decoder_layers": 2},
    ),
    "mamba": (
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 64},
        "MambaForCausalLM", {"hidden_size": 32, "intermediate_size": 64}, LAYERS,  # time_step_rank and state_size stay
    ),
    "gemma2": (GQA | {"head_dim": 16}, "Gemma2ForCausalLM", WIDE_GQA, LAYERS),
    "qwen3": (GQA | {"head_dim": 16}, "Qwen3ForCausalLM", WIDE_GQA, LAYERS),
    "opt": (
        {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32, **LAYERS, **COMMON},
        "OPTForCausalLM", {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 4}, LAYERS,
    ),
    "bart": (BOTH, "BartForConditionalGeneration", BOTH_WIDE, {"encoder_layers": 2, "decoder_layers": 2}),
    "whisper": (
        BOTH | SPECIAL | {"decoder_start_token_id": 1, "num_mel_bins": 8, "max_source_positions": 20},
        "WhisperForConditionalGeneration", BOTH_WIDE, {"encoder_layers": 2, "decoder_layers": 2},
    ),
    "deepseek_v3": (  # latent attention: ranks and head dims stay; experts show only after two dense layers
        STACK | {"num_hidden_layers": 3, "first_k_dense_replace": 2, "num_key_value_heads": 4, "moe_intermediate_size": 16,
                 "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 8,
                 "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
        "DeepseekV3ForCausalLM", WIDE | {"num_key_value_heads": 4, "moe_intermediate_size": 16}, {"num_hidden_layers": 3},
    ),
    "falcon": (  # multi-query: one key-value head, whatever num_kv_heads says
        {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, **LAYERS},
        "FalconForCausalLM", {"hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 128}, LAYERS,
    ),
    "gpt_neox": (STACK, "GPTNeoXForCausalLM", WIDE, LAYERS),
    "resnet": (
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic", "num_labels": 10},
        "ResNetForImageClassification", {"hidden_sizes": [16, 32], "embedding_size": 16}, {"depths": [1, 2]},
    ),
    "swin": (  # num_layers counts stages, hidden_size follows embed_dim
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32, "patch_size": 2, "window_size": 4},
        "SwinForImageClassification", {"embed_dim": 16, "num_heads": [2, 4]}, {"depths": [1, 1]},
    ),
    "albert": (  # one layer for all: its number shows in no parameter
        STACK | {"embedding_size": 16}, "AlbertForMaskedLM", WIDE | {"embedding_size": 16}, LAYERS,
    ),
}  # fmt: skip

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(kind: str, **changes: Any) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(TABLE[kind][0] | {"model_type": kind} | changes))
        return f"hf:{path}"

    return written


def load(reference: str, data: str | None = None, base: Scale | None = None, **options: Any) -> Family:
    return load_family(reference, load_data(data, 16) if data else None, base, batch_size=2, options=options)


def refusal(reference: str, data: str | None = None, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        load(reference, data, **options)
    sentence = str(caught.value)
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence
    return sentence


def fields(family: Family) -> Any:
    return family.build.fields  # type: ignore[attr-defined]


def shapes(family: Family, scale: Scale) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in family.build(scale).named_parameters()}


# What grows


@pytest.mark.parametrize("kind", TABLE)
def test_what_grows(kind: str, write: Write) -> None:
    """The table, and on top of it: twice the width builds, no head dim moves, and both sizes give a loss near chance."""
    _, name, width, depth = TABLE[kind]
    family = load(write(kind))
    found = fields(family)
    assert (family.name, found.width, found.depth) == (name, width, depth)
    assert all(own == doubled for _, own, doubled in found.head_dims)
    base = family.base
    assert base == Scale(*found.size)
    for scale in (base, base.with_(width=2 * base.width), base.with_(depth=2 * base.depth)):
        model = family.build(scale)
        loss = family.loss(model, family.batch)
        assert torch.equal(loss, family.loss(model, family.batch)), "something random is left"
        assert 0 < loss < 8


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gpt2", {"transformer.wte.weight": (64, 64), "transformer.h.0.attn.c_attn.weight": (64, 192),
                  "transformer.h.1.mlp.c_fc.weight": (64, 256)}),
        ("llama", {"model.layers.0.self_attn.k_proj.weight": (32, 64), "model.layers.0.mlp.up_proj.weight": (192, 64)}),
        ("gemma2", {"model.layers.0.self_attn.q_proj.weight": (128, 64), "model.layers.0.self_attn.k_proj.weight": (64, 64)}),
        ("mamba", {"backbone.layers.0.mixer.A_log": (128, 4), "backbone.layers.0.mixer.x_proj.weight": (2 + 8, 128)}),
        ("deepseek_v3", {"model.layers.0.self_attn.q_a_proj.weight": (12, 64),
                         "model.layers.2.mlp.experts.gate_up_proj": (8, 2 * 32, 64)}),
        ("t5", {"encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64)}),
    ],
)  # fmt: skip
def test_twice_the_width(kind: str, expected: dict[str, tuple[int, ...]], write: Write) -> None:
    family = load(write(kind))
    found = shapes(family, family.base.with_(width=64))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (STACK | {"model_type": "deit", "image_size": 16, "patch_size": 4}, "DeiTForImageClassification"),
        (
            {"model_type": "levit", "hidden_sizes": [16, 32, 48], "key_dim": [4, 4, 4], "num_attention_heads": [2, 4, 6],
             "depths": [1, 1, 1], "image_size": 32},
            "LevitForImageClassification",
        ),
    ],
)  # fmt: skip
def test_one_head_of_several_classes(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    """transformers lists a class with a teacher beside the plain one, as a tuple."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = load(f"hf:{tmp_path}")
    assert family.name == name
    assert shapes(family, family.base.with_(width=2 * family.base.width))


def test_the_files_own_size_is_the_model_transformers_builds(write: Write) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    family = load(write("llama"))
    assert family.base == Scale(32, 2)
    torch.manual_seed(1)
    ours = family.build(family.base).state_dict()
    torch.manual_seed(1)
    theirs = LlamaForCausalLM(LlamaConfig(**GQA)).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_user_names_what_grows(write: Write) -> None:
    family = load(write("qwen3"), width_fields=["hidden_size", "intermediate_size"], depth_fields=["num_hidden_layers"])
    assert fields(family).width == {"hidden_size": 32, "intermediate_size": 96}
    assert shapes(family, Scale(64, 2))["model.layers.0.self_attn.q_proj.weight"] == (
        64,
        64,
    )  # 4 heads of 16, as before
    # A common name stands for the config's own; without its heads the head dim has to grow.
    family = load(write("gpt2"), width_fields=["hidden_size"])
    assert (fields(family).width, fields(family).head_dims) == ({"n_embd": 32}, (("head_dim", 8, 16),))
    assert "head dim grows 8→16" in describe_changes(fields(family).between(Scale(32, 2), Scale(64, 2)))


def test_a_field_that_only_later_layers_read(write: Write) -> None:
    family = load(write("deepseek_v3", num_hidden_layers=11, first_k_dense_replace=10))
    assert fields(family).width["moe_intermediate_size"] == 16


def test_a_field_that_only_the_forward_pass_reads(write: Write) -> None:
    assert fields(load(write("albert"), depth_fields=["num_hidden_layers"])).depth == LAYERS


def test_a_nested_config(write: Write, tmp_path: Path) -> None:
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **STACK}
    config = {"model_type": "llava", "text_config": {"model_type": "llama", **GQA}, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = load(f"hf:{tmp_path}")
    assert next(iter(fields(family).width)) == "text_config.hidden_size"
    assert {"vision_config.hidden_size", "text_config.num_key_value_heads"} <= fields(family).width.keys()
    wide = shapes(family, Scale(64, 2))
    assert wide["model.vision_tower.embeddings.class_embedding"] == (64,)


def test_layer_lists_follow_the_depth() -> None:
    config = {"num_hidden_layers": 4, "layer_types": ["s", "f", "s", "f"], "mlp_layer_types": ["d", "m", "m", "m"],
              "kernels": [1, 2, 3, 4]}  # fmt: skip
    deeper = resized(config, {"num_hidden_layers": 8}, {"num_hidden_layers"})
    assert deeper["layer_types"] == ["s", "f"] * 4
    assert deeper["mlp_layer_types"] == ["d", "d", *"mmmmmm"]
    assert deeper["kernels"] == [1, 2, 3, 4]
    assert config["num_hidden_layers"] == 4


@pytest.mark.parametrize(
    ("kind", "scale", "expected"),
    [
        ("llama", Scale(40, 2), "num_key_value_heads 2·40/32 = 2.5: use a multiple of 16"),
        ("gpt2", Scale(36, 2), "n_head 4·36/32 = 4.5: use a multiple of 8"),
        ("llama", Scale(4, 2), "use a multiple of 16"),
        ("resnet", Scale(16, 3), None),
        ("t5", Scale(32, 3), None),
    ],
)
def test_sizes_that_are_not_whole(kind: str, scale: Scale, expected: str | None, write: Write) -> None:
    family = load(write(kind))
    if expected is None:
        assert shapes(family, scale)
        return
    with pytest.raises(RequestError, match=re.escape(expected)):
        family.build(scale)


# What it is trained on


def test_data_of_its_kind_and_targets_that_are_not_shifted_twice(write: Write) -> None:
    family = load(write("gpt2", vocab_size=256), "bytes")
    inputs, targets = family.batch
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    model: Any = family.build(family.base)
    logits = model(input_ids=inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 256), targets.reshape(-1))
    torch.testing.assert_close(family.loss(model, family.batch), expected)


def test_a_masked_model_sees_no_answer(write: Write) -> None:
    family = load(write("bert"))
    model = family.build(family.base)
    inputs, targets = family.batch
    changed = inputs.clone()
    changed[:, 3::7] = (changed[:, 3::7] + 1) % 63  # what is asked for, and not shown
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    assert family.loss(model, (inputs, targets)) != family.loss(model, (changed, targets))
    assert torch.equal(*seen)


def test_images_are_made_to_fit(write: Write) -> None:
    """Digits are 8x8 of one channel, the config asks for 16x16 of three."""
    family = load(write("vit"), "digits")
    assert family.batch[0].shape == (2, 1, 8, 8)
    assert torch.isfinite(family.loss(family.build(family.base), family.batch))


def test_experts_can_be_observed_without_values(write: Write) -> None:
    family = load(write("mixtral"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert family.loss(family.build(family.base), family.batch).shape == ()


def test_a_family_is_planned_and_resized(write: Write) -> None:
    family = load(write("llama"), base=Scale(64, 2))
    assert family.base == Scale(64, 2)
    rows = {row.name: row for row in mt.plan(family, Scale(128, 2)).rows}
    assert (rows["model.layers.0.mlp.down_proj.weight"].m_in, rows["lm_head.weight"].role) == (2, "output")
    assert rows["model.layers.0.mlp.down_proj.weight"].shape == (128, 384)


# What is refused


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llamma"}, "did you mean 'llama'?"),
        ({"model_type": "zorp", "auto_map": {"AutoModel": "modeling_zorp.Zorp"}}, "custom code (auto_map)"),
        ({"hidden_size": 32}, 'has no "model_type"'),
        ([1], 'has no "model_type"'),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLLM"]}, "did you mean 'LlamaForCausalLM'?"),
        ({"model_type": "llama", "architectures": [["LlamaForCausalLM"]]}, "transformers has no ['LlamaForCausalLM']"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "has no head and thus no logits"),
        ({"model_type": "llama", "hidden_size": "wide"}, "expected int, got str"),
        ({"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4}, "33"),
        ({"model_type": "perceiver"}, "no example batch is known for PerceiverForMaskedLM"),
        ({"model_type": "perceiver", "architectures": ["PerceiverForImageClassificationLearned"]}, "is known for Perc"),
        ({"model_type": "sam"}, "no model with logits is known for 'sam'"),
    ],
)
def test_a_wrong_config(config: Any, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert expected in refusal(f"hf:{tmp_path}")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    assert "there is no file" in refusal(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refusal(f"hf:{tmp_path}/config.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "rms_norm_eps": NaN}', encoding="utf-8")
    assert "a number is NaN" in refusal(f"hf:{tmp_path}/config.json")


def test_without_transformers(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # what Python itself takes for "not there"
    assert "pip install 'mutransfer[hf]'" in refusal(write("llama"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"width_fields": ["hidden_sise"]}, "hidden_sise is not an integer field of the config: did you mean 'hidden_size'"),
        ({"width_fields": ["rms_norm_eps"]}, "known names are bos_token_id, eos_token_id, head_dim, hidden_size"),
        ({"width_fields": ["max_position_embeddings"]}, "changes no parameter"),
        ({"width_fields": ["hidden_size", "pretraining_tp"]}, "pretraining_tp changes nothing"),
        ({"depth_fields": ["layers"]}, "--depth-field layers is not an integer field"),
        ({"width_fields": "hidden_size"}, "give a list"),
        ({"hiden_size": 64}, "no field 'hiden_size': did you mean 'hidden_size'?"),
    ],
)  # fmt: skip
def test_a_wrong_option(options: dict[str, Any], expected: str, write: Write) -> None:
    assert expected in refusal(write("llama"), **options)


def test_data_that_does_not_fit(write: Write) -> None:
    assert "has 256 different tokens, but the vocab_size of" in refusal(write("llama"), "bytes")
    assert "reads tokens, but the data 'digits' holds images" in refusal(write("llama"), "digits")
    assert "reads images, but the data 'bytes' holds tokens" in refusal(write("vit"), "bytes")
    assert '"num_labels": 10' in refusal(write("vit", num_labels=2), "digits")
    assert "16 tokens, but the max_position_embeddings" in refusal(
        write("llama", vocab_size=256, max_position_embeddings=8), "bytes"
    )
    assert "needs input_features" in refusal(write("whisper"), "bytes")
    assert load(write("vit", num_labels=2), "digits", num_labels=10).name == "ViTForImageClassification"
