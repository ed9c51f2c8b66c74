"""Residual branches however they are written, roles that are named, and uses that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mutransfer.errors import RequestError

from ..helpers.handmade import parameter, places, roles, seen


def test_post_norm_residuals() -> None:
    """norm(x + f(x)): the norm stands on the stream, and what precedes the sum ends the branch."""
    found = seen(
        lambda n: {"up": nn.Linear(n, 2 * n, bias=False), "down": nn.Linear(2 * n, n), "norm": nn.LayerNorm(n)},
        lambda net, x: net.norm(x + net.down(net.up(x).relu())),
    )
    assert places(found) == {
        "up.weight": "in",
        "down.weight": "end",
        "down.bias": "end",
        "norm.weight": "-",
        "norm.bias": "-",
    }


def test_parallel_attention_and_mlp() -> None:
    """x + a(n(x)) + m(n(x)): both end a branch, and share the norm before them."""

    def apply(net: Any, x: torch.Tensor) -> torch.Tensor:
        h = net.norm(x)
        return x + net.out(F.scaled_dot_product_attention(net.q(h), net.k(h), net.v(h))) + net.down(net.up(h).relu())

    found = seen(
        lambda n: (
            {name: nn.Linear(n, n, bias=False) for name in ("q", "k", "v", "out", "up", "down")}
            | {"norm": nn.RMSNorm(n)}
        ),
        apply,
    )
    inner = dict.fromkeys(("q.weight", "k.weight", "v.weight", "up.weight", "norm.weight"), "in")
    assert places(found) == inner | {"out.weight": "end", "down.weight": "end"}


def test_encoder_and_decoder() -> None:
    """What ends the encoder feeds all layers of the decoder and is none of theirs; the keys a layer makes of it are."""

    def cross(net: Any, x: torch.Tensor) -> torch.Tensor:
        memory = net.encoder_norm(x + net.encode(x))
        y = x.flip(1)
        for i in (0, 1):
            q, k = net.q[i](y), net.k[i](memory)
            y = y + net.out[i](F.scaled_dot_product_attention(q, k, memory))
        return y

    def parts(n: int) -> dict[str, Any]:
        layers = {name: nn.ModuleList(nn.Linear(n, n, bias=False) for _ in range(2)) for name in ("q", "k", "out")}
        return layers | {"encode": nn.Linear(n, n, bias=False), "encoder_norm": nn.RMSNorm(n)}

    expected = {
        f"{name}.{i}.weight": place for name, place in (("q", "in"), ("k", "in"), ("out", "end")) for i in (0, 1)
    }
    assert places(seen(parts, cross)) == expected | {"encode.weight": "end", "encoder_norm.weight": "-"}


def test_roles_can_be_named_by_pattern() -> None:
    def apply(net: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ net.w.cumsum(0)

    with pytest.raises(RequestError, match=r"operation 'cumsum'.*roles=\{'w': 'hidden'\}"):
        seen(lambda n: {"w": parameter(n, n)}, apply)
    assert roles(seen(lambda n: {"w": parameter(n, n)}, apply, **{"w*": "hidden"})) == {"w": "hidden"}
    with pytest.raises(RequestError, match=r"gives w the role 'hiden', which is unknown: did you mean 'hidden'"):
        seen(lambda n: {"w": parameter(n, n)}, apply, w="hiden")


def test_a_mask_embedding_that_the_batch_does_not_use() -> None:
    """Its shape leaves one role; a matrix's leaves two, and is refused (test_observe)."""
    found = seen(lambda n: {"masked": parameter(1, 1, n), "flag": parameter(1)}, lambda net, x: x)
    assert roles(found) == {"masked": "vector", "flag": "finite"}
    assert [note.partition(" is not used")[0] for note in found.notes] == ["masked", "flag"]


@pytest.mark.parametrize("part", [lambda n: nn.Linear(n, 1, bias=False), lambda n: nn.Conv1d(n, 1, 1, bias=False)])
def test_an_unused_layer_with_one_output_is_refused(part: Callable[[int], nn.Module]) -> None:
    """Of its shape (1, n) are masks as well, and those are inputs: 1/m on one of the two would be wrong."""
    with pytest.raises(RequestError, match=r"head\.weight \[1, 16(, 1)?\] is never used in the forward pass"):
        seen(lambda n: {"head": part(n)}, lambda net, x: x)
    assert roles(seen(lambda n: {"mask": parameter(1, n)}, lambda net, x: x)) == {"mask": "vector"}


@pytest.mark.parametrize("out", [lambda n: n, lambda n: 1, lambda n: 4])
def test_a_bilinear_form_is_refused_without_a_wrong_advice(out: Callable[[int], int]) -> None:
    with pytest.raises(
        RequestError, match=r"bilinear\.weight .* is a bilinear form, which sums over two axes"
    ) as refused:
        seen(
            lambda n: {"bilinear": nn.Bilinear(n, n, out(n))},
            lambda net, x: x * net.bilinear(x, x).mean(-1, keepdim=True),
        )
    assert "roles=" not in str(refused.value)


def test_a_learned_bias_inside_fused_attention() -> None:
    """Swin adds a table, one column per head, to its attention logits."""

    def apply(net: Any, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (-1, 4)).transpose(1, 2)
        bias = net.table[torch.arange(49) % 9].unflatten(0, (7, 7)).permute(2, 0, 1)[None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).transpose(1, 2).flatten(2)

    spec = seen(lambda n: {"table": parameter(9, n // 4)}, apply).specs["table"]
    assert spec.role == "input"
    assert spec.multipliers((9, 16)) == (1, 4)
