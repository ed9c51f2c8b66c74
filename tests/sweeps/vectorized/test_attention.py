"""Attention and RMSNorm of stacked models equal those of model by model, with all arguments of torch's functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mutransfer.sweeps.vectorized.step import StackedKernels

K, B, H, T, S, D = 3, 2, 4, 5, 7, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def holes(*shape: int) -> Tensor:
    """A boolean mask that leaves every query at least its first key."""
    mask = draw(*shape, seed=9) > 0
    mask[..., 0] = True
    return mask


def folded(inputs: list[Tensor | None], dims: list[int | None], call: Callable[..., Tensor]) -> list[Tensor]:
    """Output and gradients of the mapped call."""
    leaves = [
        each.clone().requires_grad_() if each is not None and each.is_floating_point() else each for each in inputs
    ]
    with StackedKernels(), warnings.catch_warnings():
        warnings.simplefilter("error")  # no silent loop over the models
        out = torch.vmap(call, in_dims=tuple(dims))(*leaves)
    weights = draw(*out.shape, seed=5)
    grads = torch.autograd.grad(
        (out * weights).sum(), [each for each in leaves if each is not None and each.requires_grad]
    )
    return [out, *grads]


def one_by_one(inputs: list[Tensor | None], dims: list[int | None], call: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [
        each.clone().requires_grad_() if each is not None and each.is_floating_point() else each for each in inputs
    ]
    pick = lambda each, dim, k: each if each is None or dim is None else each.select(dim, k)  # noqa: E731
    out = torch.stack([call(*map(pick, leaves, dims, [k] * 4)) for k in range(K)])
    weights = draw(*out.shape, seed=5)
    grads = torch.autograd.grad(
        (out * weights).sum(), [each for each in leaves if each is not None and each.requires_grad]
    )
    return [out, *grads]


def compare(inputs: list[Tensor | None], dims: list[int | None], **options: Any) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    for ours, theirs in zip(folded(inputs, dims, call), one_by_one(inputs, dims, call), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def qkv(lead: tuple[int, ...] = (K, B, H), heads: int | None = None) -> list[Tensor]:
    own = lead if heads is None else (*lead[:-1], heads)
    return [draw(*lead, T, D, seed=1), draw(*own, S, D, seed=2), draw(*own, S, D, seed=3)]


OPTIONS: list[dict[str, Any]] = [{}, {"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "scale": 2.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_causal_and_scaled(options: dict[str, Any]) -> None:
    compare([*qkv(), None], [0, 0, 0, None], **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_grouped_queries(options: dict[str, Any]) -> None:
    compare([*qkv(heads=2), None], [0, 0, 0, None], enable_gqa=True, **options)


MASKS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "shared [T, S]": ((T, S), None),
    "shared [1, 1, T, S]": ((1, 1, T, S), None),
    "shared [B, 1, T, S]": ((B, 1, T, S), None),
    "shared [H, T, S]": ((H, T, S), None),
    "shared [B, H, 1, S]": ((B, H, 1, S), None),
    "own [T, S]": ((K, T, S), 0),
    "own [1, H, T, S]": ((K, 1, H, T, S), 0),
    "own [B, 1, 1, S]": ((K, B, 1, 1, S), 0),
    "own [B, H, T, S]": ((K, B, H, T, S), 0),
    "own, last axis": ((B, 1, T, S, K), 4),
}


@pytest.mark.parametrize("kind", ["bias", "boolean"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, kind: str) -> None:
    shape, dim = MASKS[name]
    mask = draw(*shape, seed=4) if kind == "bias" else holes(*shape).movedim(-1, 0).movedim(0, -1)
    if kind == "boolean" and dim == 4:
        mask[..., 0, :] = True
    compare([*qkv(), mask], [0, 0, 0, dim], scale=0.7)


@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, 0), (None, None, 0), (2, 0, 1)], ids=str)
def test_what_all_models_share_and_other_axes(dims: tuple[int | None, ...]) -> None:
    inputs = qkv()
    moved = [each[0] if dim is None else each.movedim(0, dim) for each, dim in zip(inputs, dims, strict=True)]
    compare([*moved, None], [*dims, None], is_causal=True)


def test_without_batch_or_heads() -> None:
    compare([*qkv((K, H)), draw(K, T, S)], [0, 0, 0, 0])
    compare([*qkv((K,)), draw(T, S)], [0, 0, 0, None])
    compare([*qkv((K, H)), None], [0, 0, 0, None], is_causal=True)
    compare([*qkv((K, H), heads=2), None], [0, 0, 0, None], enable_gqa=True)


def test_further_batch_axes_and_keys_that_a_batch_shares() -> None:
    compare([*qkv((K, B, 3, H)), None], [0, 0, 0, None], is_causal=True)
    q, k, v = qkv()
    compare([q, k[:, :1], v[:, :1], None], [0, 0, 0, None])


def test_what_is_shared_by_all_is_computed_once() -> None:
    q, k, v = (each[0] for each in qkv())

    def call(x: Tensor) -> Tensor:
        return x * F.scaled_dot_product_attention(q, k, v, scale=0.2)

    x = draw(K)
    with StackedKernels():
        out = torch.vmap(call)(x)
    torch.testing.assert_close(out[1], call(x[1]))


def test_dropout_drops_in_every_model_for_itself() -> None:
    v = torch.ones(K, B, H, S, D)
    q, k = torch.zeros(K, B, H, T, D), torch.zeros(K, B, H, S, D)
    with StackedKernels():
        out = torch.vmap(lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.5), randomness="different")(q, k, v)
    assert not torch.equal(out[0], out[1])
    torch.testing.assert_close(out.mean(), torch.tensor(1.0), rtol=0.1, atol=0)


def test_torchs_own_attention_layer() -> None:
    layers = [nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64) for _ in range(K)]
    x = draw(K, B, T, 16)
    parameters, _ = torch.func.stack_module_state(layers)
    run = lambda p, x: torch.func.functional_call(layers[0], p, (x, x, x), {"need_weights": False})[0]  # noqa: E731
    with StackedKernels(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        out = torch.vmap(run)(parameters, x)
    for k, layer in enumerate(layers):
        torch.testing.assert_close(out[k], layer(x[k], x[k], x[k], need_weights=False)[0])


@pytest.mark.parametrize("shape", [(), (B,), (B, T), (B, H, T)])
@pytest.mark.parametrize("dims", [(0, 0), (0, None), (1, 0)])
@pytest.mark.parametrize("eps", [None, 0.1])
def test_the_written_out_gradient_of_rms_norm(shape: tuple[int, ...], dims: tuple[int, ...], eps: float | None) -> None:
    if dims[0] == 1 and not shape:
        dims = (0, 0)
    x = draw(K, *shape, D) if dims[0] == 0 else draw(shape[0], K, *shape[1:], D)
    weight = draw(*([K] if dims[1] == 0 else []), D, seed=1)
    call = lambda x, weight: F.rms_norm(x, (D,), weight, eps)  # noqa: E731
    ours, theirs = folded([x, weight], [*dims], call), one_by_one([x, weight], [*dims], call)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rms_norm_without_weights_and_over_two_axes_is_torchs() -> None:
    for shape, weight in (((D,), None), ((T, D), draw(T, D))):
        call = lambda x, shape=shape, weight=weight: F.rms_norm(x, shape, weight)  # noqa: E731
        ours, theirs = folded([draw(K, T, D)], [0], call), one_by_one([draw(K, T, D)], [0], call)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
