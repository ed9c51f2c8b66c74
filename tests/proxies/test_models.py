"""The built-in models are the architectures they say they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.price import step_flops
from mutransfer.proxies.models import MLP, Attention, ResNet, Transformer, TransformerShape, apply_rotary, rotary_table
from mutransfer.recipe import Scale

from ..helpers import families

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"ffn": "gelu", "ffn_ratio": 4.0},
    "tied": {"tied": True},
    "kv_share": {"kv_share": 2, "head_dim": 8},
    "kv_heads": {"kv_heads": 1, "head_dim": 8},
    "heads": {"head_dim": None, "heads": 4},
    "qk_norm": {"qk_norm": True, "head_dim": None, "heads": 4, "kv_heads": 2},
}


def transformer(width: int = 32, depth: int = 2, vocabulary: int = 11, **shape: Any) -> Transformer:
    return Transformer(TransformerShape(width, depth, vocabulary, **shape))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_mlp(depth: int) -> None:
    model = MLP(inputs=64, width=24, depth=depth, classes=10)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert [tuple(layer.weight.shape) for layer in model.hidden] == (depth - 1) * [(24, 24)]
    assert sum(p.numel() for p in model.parameters()) == 65 * 24 + (depth - 1) * 25 * 24 + 25 * 10


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_resnet(depth: int, channels: int) -> None:
    model = ResNet(inputs=channels, width=16, depth=depth, classes=10)
    assert model(torch.randn(3, channels, 8, 8)).shape == (3, 10)
    assert len(model.blocks) == depth
    matrices = 9 * channels * 16 + depth * 2 * 9 * 16 * 16 + 16 * 10
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == matrices


def test_the_resnets_stream_is_residual() -> None:
    """With the branches' last convolutions at zero, blocks pass their input on."""
    model = ResNet(1, 8, 3, 10)
    x = torch.randn(2, 8, 4, 4)
    for block in model.blocks:
        nn.init.zeros_(block.conv2.weight)  # type: ignore[union-attr, arg-type]
        assert torch.equal(block(x), x)


@pytest.mark.parametrize("name", SHAPES)
def test_the_transformer(name: str) -> None:
    shape = TransformerShape(32, 2, 11, **SHAPES[name])
    model = Transformer(shape)
    assert model(torch.randint(11, (3, 7))).shape == (3, 7, 11)
    attention = model.blocks[0].attention
    assert isinstance(attention, Attention)
    assert attention.q.out_features == attention.out.in_features == 32 == shape.n_heads * shape.size_D
    assert attention.k.out_features == attention.v.out_features == shape.n_kv * shape.size_D
    assert (model.readout.weight is model.embedding.weight) == (name == "tied")


def test_the_transformers_own_initialization() -> None:
    model = transformer(width=256, depth=1)
    assert model.blocks[0].ffn.down.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)  # type: ignore[union-attr]
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.05)
    tied = transformer(width=256, depth=1, tied=True, std=0.02, vocabulary=100)
    assert tied.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_causal(name: str) -> None:
    """Logits up to t do not depend on tokens after t, and do on the token at t."""
    model = transformer(**SHAPES[name])
    tokens = torch.randint(11, (1, 9))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    a, b = model(tokens)[0], model(changed)[0]
    assert torch.allclose(a[:5], b[:5], atol=1e-6)
    assert all(not torch.allclose(a[t], b[t], atol=1e-4) for t in range(5, 9))


@pytest.mark.parametrize("dim", [2, 8, 16])
def test_rotary_products_depend_on_distance_only(dim: int) -> None:
    q, k = torch.randn(2, dim, dtype=torch.float64)
    T = 12
    rotated_q, rotated_k = (apply_rotary(x.expand(1, 1, T, dim), rotary_table(T, dim))[0, 0] for x in (q, k))
    products = rotated_q @ rotated_k.T
    for distance in range(-T + 1, T):
        diagonal = products.diagonal(distance)
        # the angles are computed in float32
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)
    assert torch.allclose(rotated_q.norm(dim=-1), q.norm().expand(T))
    assert torch.allclose(rotated_q[0], q)
    assert not torch.allclose(products.diagonal(3)[0], products.diagonal(0)[0], atol=1e-3)


@pytest.mark.parametrize("shape", [{"kv_heads": 2}, {"kv_share": 2}, {"kv_heads": 1, "qk_norm": True}])
def test_grouped_queries_are_repeated_keys_and_values(shape: dict[str, Any]) -> None:
    grouped = Attention(TransformerShape(32, 1, 11, head_dim=8, **shape))
    full = Attention(TransformerShape(32, 1, 11, head_dim=8, qk_norm=shape.get("qk_norm", False)))
    share = grouped.shape.n_heads // grouped.shape.n_kv
    full.q.weight, full.out.weight = grouped.q.weight, grouped.out.weight
    for theirs, ours in ((full.k, grouped.k), (full.v, grouped.v)):
        heads = ours.weight.view(grouped.shape.n_kv, 8, 32).repeat_interleave(share, dim=0)
        theirs.weight = nn.Parameter(heads.reshape(32, 32))
    x = torch.randn(2, 5, 32)
    rotary = rotary_table(5, 8)
    assert share > 1
    assert torch.allclose(grouped(x, rotary), full(x, rotary), atol=1e-5)


def test_attention_is_softmax_attention() -> None:
    """One head, by hand."""
    attention = Attention(TransformerShape(8, 1, 11, head_dim=8))
    x = torch.randn(1, 5, 8)
    rotary = rotary_table(5, 8)
    q, k = (apply_rotary(layer(x)[:, None], rotary)[0, 0] for layer in (attention.q, attention.k))
    mask = torch.full((5, 5), float("-inf")).triu(1)
    weights = (q @ k.T / 8**0.5 + mask).softmax(-1)
    assert torch.allclose(attention(x, rotary)[0], attention.out(weights @ attention.v(x)[0]), atol=1e-5)


def test_the_feed_forward_layers_by_hand() -> None:
    x = torch.randn(2, 3, 16)
    swiglu = transformer(width=16).blocks[0].ffn
    expected = (F.silu(x @ swiglu.gate.weight.T) * (x @ swiglu.up.weight.T)) @ swiglu.down.weight.T  # type: ignore[union-attr]
    assert torch.allclose(swiglu(x), expected, atol=1e-5)  # type: ignore[operator]
    gelu = transformer(width=16, ffn="gelu").blocks[0].ffn
    assert gelu.gate is None  # type: ignore[union-attr]
    assert torch.allclose(gelu(x), F.gelu(x @ gelu.up.weight.T) @ gelu.down.weight.T, atol=1e-5)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("width", "shape", "message"),
    [
        (36, {}, "width 36 is not a multiple of the head dim 16: use a multiple of 16"),
        (34, {"head_dim": None, "heads": 4}, "width 34 is not a multiple of the head count 4"),
        (32, {"heads": 2}, "fixes either head_dim or heads"),
        (32, {"head_dim": None}, "fixes either head_dim or heads"),
        (64, {"kv_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        (12, {"head_dim": None, "heads": 4}, "head dim 3 is odd"),
        (32, {"head_dim": 64}, "width 32 is not a multiple of the head dim 64"),
    ],
)
def test_a_transformer_of_a_bad_shape_is_refused(width: int, shape: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TransformerShape(width, 2, 11, **shape)


def test_a_resnet_of_a_bad_width_is_refused() -> None:
    with pytest.raises(RequestError, match="resnet's width 20 is not a multiple of its 8 norm groups: try 24"):
        ResNet(1, 20, 2, 10)
    with pytest.raises(RequestError, match="resnet's width 20"):
        mt.plan(families.resnet(), Scale(20))


@pytest.mark.parametrize(("width", "depth", "size"), [(16, 3, 16), (48, 1, 16), (32, 5, 4)])
def test_flops_of_an_mlp_by_hand(width: int, depth: int, size: int) -> None:
    """2·n·m per example forward, twice that backward; the data needs no gradient, so the first layer's is once."""
    family = families.mlp(width=width, depth=depth)
    first, hidden, readout = 64 * width, width * width, width * 10
    expected = 2 * size * (2 * first + 3 * (depth - 1) * hidden + 3 * readout)
    assert step_flops(family, family.base, families.image_batch(size)) == expected


def test_flops_of_a_transformer_are_six_per_weight_and_token() -> None:
    """6·N·D beside the attention products, which are small at this length; the embedding is a gather."""
    family = families.transformer(width=128, depth=2)
    matrices = sum(
        p.numel() for n, p in family.build(family.base).named_parameters() if p.dim() > 1 and "embed" not in n
    )
    tokens = family.batch[0].numel()
    flops = step_flops(family, family.base, family.batch)
    assert 6 * matrices * tokens <= flops < 1.1 * 6 * matrices * tokens
    doubled = step_flops(family, family.base, tuple(x.repeat(2, 1) for x in family.batch))
    assert doubled == 2 * flops
