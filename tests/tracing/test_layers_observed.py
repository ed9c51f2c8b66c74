"""Layers as people write them, by hand: what each of their parameters is, or how it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.family import Family
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe

from ..helpers.handmade import FEATURES, Net, family, parameter, roles, seen


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_with_more_heads(batch_first: bool) -> None:
    """q, k, v share one matrix; the head dim stays, so nothing has to be folded into it."""
    found = seen(
        lambda n: {"attention": nn.MultiheadAttention(n, n // 4, batch_first=batch_first)},
        lambda net, x: x + net.attention(x, x, x, need_weights=False)[0],
    )
    assert roles(found) == {
        "attention.in_proj_weight": "hidden",
        "attention.in_proj_bias": "vector",
        "attention.out_proj.weight": "hidden",
        "attention.out_proj.bias": "vector",
    }
    assert (found.heads.dim, found.heads.ratio) == (4, 1)
    ends = {name for name, spec in found.specs.items() if spec.ends_branch}
    assert ends == {"attention.out_proj.weight", "attention.out_proj.bias"}


def test_multihead_attention_with_larger_heads_is_refused() -> None:
    """1/d attention needs a factor on the queries alone, and they share a matrix with keys and values."""
    of = family(
        lambda n: {"attention": nn.MultiheadAttention(n, 2, batch_first=True)},
        lambda net, x: net.attention(x, x, x, need_weights=False)[0],
    )
    assert observe(of).heads.ratio == 2
    with pytest.raises(
        RequestError, match=r"in_proj_bias also produces keys, values or something else: use a separate query"
    ):
        mt.plan(of, Scale(64))


def test_multihead_attention_over_another_width_has_matrices_of_its_own() -> None:
    found = seen(
        lambda n: {"attention": nn.MultiheadAttention(n, n // 4, kdim=6, vdim=6, batch_first=True)},
        lambda net, x: net.attention(x, torch.ones(3, 2, 6), torch.ones(3, 2, 6), need_weights=False)[0],
    )
    assert {name: role for name, role in roles(found).items() if "proj_weight" in name} == {
        "attention.q_proj_weight": "hidden",
        "attention.k_proj_weight": "input",
        "attention.v_proj_weight": "input",
    }


def lora(n: int) -> dict[str, Any]:
    return {"base": nn.Linear(n, n).requires_grad_(False), "A": parameter(4, n), "B": nn.Parameter(torch.zeros(n, 4))}


def test_lora() -> None:
    """A is a bottleneck and B an input; the frozen weight under them is not the optimizer's, and left out."""
    found = seen(lora, lambda net, x: net.base(x) + x @ net.A.T @ net.B.T)
    assert roles(found) == {"A": "bottleneck", "B": "input"}
    assert found.specs["A"].multipliers((4, 64)) == (4, 1)
    assert found.specs["B"].multipliers((64, 4)) == (1, 4)


def test_lora_multiplied_before_it_meets_activations_is_refused_until_named() -> None:
    def merged(net: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, net.base.weight + net.B @ net.A)

    with pytest.raises(RequestError, match=r"role of A \[4, 16\]: it is multiplied by another parameter \('mm'\)"):
        seen(lora, merged)
    named = seen(lora, merged, A="bottleneck", B="input")
    assert roles(named) == {"A": "bottleneck", "B": "input"}
    assert named.specs["A"].multipliers((4, 64)) == (4, 1)
    assert named.specs["B"].multipliers((64, 4)) == (1, 4)


def test_learned_queries_are_rows_that_enter() -> None:
    """A table projected as activations are is an input, whatever the projection contracts."""
    found = seen(
        lambda n: {"queries": parameter(3, n), "q": nn.Linear(n, n, bias=False)},
        lambda net, x: F.scaled_dot_product_attention(net.q(net.queries.expand(len(x), -1, -1)), x, x),
    )
    assert roles(found) == {"queries": "input", "q.weight": "hidden"}
    assert found.specs["queries"].multipliers((3, 64)) == (1, 4)


CHOSEN = torch.tensor([2, 0, 1])
EXPERTS: dict[str, tuple[Callable[[int], tuple[int, ...]], Callable[..., torch.Tensor]]] = {
    "bmm": (lambda n: (3, n, n), lambda net, x: x.bmm(net.experts)),
    "baddbmm": (lambda n: (3, n, n), lambda net, x: torch.baddbmm(x, x, net.experts)),
    "einsum": (lambda n: (3, n, n), lambda net, x: torch.einsum("eti,eio->eto", x, net.experts)),
    "index": (lambda n: (3, n, n), lambda net, x: x.bmm(net.experts[CHOSEN])),
    "index_select": (lambda n: (3, n, n), lambda net, x: x.bmm(net.experts.index_select(0, CHOSEN))),
    "one by one": (lambda n: (3, n, n), lambda net, x: torch.stack([x[i] @ net.experts[i] for i in range(3)])),
    "_grouped_mm": (
        lambda n: (3, n, n),
        lambda net, x: torch._grouped_mm(
            x.flatten(0, 1).bfloat16(), net.experts.bfloat16(), offs=torch.tensor([7, 14, 21], dtype=torch.int32)
        ).to(x.dtype).unflatten(0, (3, 7)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", EXPERTS)
def test_a_stack_of_experts_however_it_is_written(way: str) -> None:
    shape, apply = EXPERTS[way]
    spec = seen(lambda n: {"experts": parameter(*shape(n))}, apply).specs["experts"]
    assert spec.role == "hidden"
    assert spec.axes[1:] == ("in", "out")
    assert spec.multipliers((3, 32, 64)) == (2, 4)


def test_qk_norm_carries_the_queries_factor() -> None:
    def apply(net: Any, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(net.q_norm(net.q(x)), net.k_norm(net.k(x)), x)

    found = seen(
        lambda n: (
            {name: nn.Linear(n, n, bias=False) for name in "qk"} | {f"{name}_norm": nn.RMSNorm(n) for name in "qk"}
        ),
        apply,
    )
    assert found.queries == {"q_norm.weight"}
    assert roles(found) == {
        "q.weight": "hidden",
        "k.weight": "hidden",
        "q_norm.weight": "vector",
        "k_norm.weight": "vector",
    }


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (parametrizations.weight_norm, {"original0": "vector", "original1": "hidden"}),  # g and v
        (parametrizations.spectral_norm, {"original": "hidden"}),
    ],
)
def test_parametrized_weights(wrap: Callable[..., nn.Module], expected: dict[str, str]) -> None:
    found = seen(lambda n: {"hidden": wrap(nn.Linear(n, n, bias=False))}, lambda net, x: net.hidden(x))
    assert {name.rpartition(".")[2]: role for name, role in roles(found).items()} == expected


def test_weight_norm_over_the_outputs_is_refused() -> None:
    with pytest.raises(
        RequestError,
        match=r"original0 \[1, 16\] is the magnitude of a weight that is normalized over its outputs as well",
    ):
        seen(lambda n: {"hidden": parametrizations.weight_norm(nn.Linear(n, n), dim=1)}, lambda net, x: net.hidden(x))


def test_a_matrix_kept_with_its_heads_apart() -> None:
    """(in, heads, head dim), as XLNet keeps it: an einsum merges the last two, and each still grows by its own ratio."""
    spec = seen(
        lambda n: {"q": parameter(n, n // 4, 4)}, lambda net, x: torch.einsum("bti,ihd->bthd", x, net.q).flatten(2)
    ).specs["q"]
    assert (spec.role, spec.axes) == ("hidden", ("in", "out", "out"))
    assert spec.multipliers((64, 8, 4)) == (4, 2)


def grouped(net: Any, x: torch.Tensor) -> torch.Tensor:
    """One projection for growing queries and one head each of keys and values."""
    n = x.shape[-1]
    q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in net.qkv(x).split([n, 8, 8], -1))
    return net.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def test_fused_projections_that_grow_unevenly() -> None:
    """Under AdamW one learning rate fits all rows; SGD would need one for each, and is refused."""
    of = family(lambda n: {"qkv": nn.Linear(n, n + 16, bias=False), "out": nn.Linear(n, n, bias=False)}, grouped)
    assert observe(of).specs["qkv.weight"].mixed
    assert any("qkv.weight" in note for note in mt.plan(of, Scale(64)).notes)
    with pytest.raises(RequestError, match=r"qkv\.weight \[80, 64\] is one matrix whose rows have different roles"):
        mt.plan(of, Scale(64), optimizer="sgd")


def by_rows(net: Any, x: torch.Tensor) -> torch.Tensor:
    """The same with the matrix cut instead of its result."""
    n, w = x.shape[-1], net.qkv.weight
    q, k, v = (F.linear(x, part).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (w[:n], w[n : n + 8], w[n + 8 :]))
    return net.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def sliced(net: Any, x: torch.Tensor) -> torch.Tensor:
    """The same with each piece taken by itself."""
    n, qkv = x.shape[-1], net.qkv(x)
    parts = qkv[..., :n], qkv[..., n : n + 8], qkv.narrow(-1, n + 8, 8)
    q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in parts)
    return net.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("apply", [by_rows, sliced])
def test_fused_projections_that_grow_unevenly_however_they_are_cut(apply: Callable[..., torch.Tensor]) -> None:
    found = seen(lambda n: {"qkv": nn.Linear(n, n + 16, bias=False), "out": nn.Linear(n, n, bias=False)}, apply)
    assert {name for name, spec in found.specs.items() if spec.mixed} == {"qkv.weight"}


@pytest.mark.parametrize(
    "heads",
    [
        lambda x: x.split(4, -1),
        lambda x: [x[..., i : i + 4] for i in range(0, x.shape[-1], 4)],
        lambda x: x.tensor_split(x.shape[-1] // 4, -1),
    ],
    ids=["split", "slices", "tensor_split"],
)
def test_a_growing_number_of_equal_heads_is_no_mixture(heads: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
    def apply(net: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.cat([-part[..., 2:], part[..., :2]], -1).tanh() for part in heads(net.up(x))], -1)

    assert not any(spec.mixed for spec in seen(lambda n: {"up": nn.Linear(n, n)}, apply).specs.values())


def test_one_head_of_fixed_size_cut_off_is_a_mixture() -> None:
    found = seen(lambda n: {"up": nn.Linear(n, n)}, lambda net, x: x * net.up(x)[..., :4].mean(-1, keepdim=True))
    assert {name for name, spec in found.specs.items() if spec.mixed} == {"up.weight", "up.bias"}


def test_one_matrix_both_ways_round() -> None:
    """While both axes grow alike it has one ratio; where they do not, what is m_in in one use is m_out in the other."""

    def build(scale: Scale) -> nn.Module:
        n, inner = scale.width, 2 * scale.width if scale.width < 64 else 4 * scale.width
        return Net(n, {"w": parameter(n, inner)}, lambda net, x: (x @ net.w).relu() @ net.w.T)  # type: ignore[attr-defined]

    of = Family(build, torch.zeros(3, 7, FEATURES), lambda model, x: model(x).square().mean(), Scale(16))
    row = next(row for row in mt.plan(of, Scale(32)).rows if row.name == "w")
    assert (row.role, row.m_in, row.m_out) == ("hidden", 2, 2)
    with pytest.raises(RequestError, match=r"w is used in both orientations, .* grow by 4 and 8"):
        mt.plan(of, Scale(64))


def test_fused_projections_that_grow_alike() -> None:
    def apply(net: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = net.gate_up(x).chunk(2, -1)
        return net.down(F.silu(gate) * up)

    found = seen(lambda n: {"gate_up": nn.Linear(n, 4 * n), "down": nn.Linear(2 * n, n)}, apply)
    assert not any(spec.mixed for spec in found.specs.values())
    expected = {"gate_up.weight": "hidden", "gate_up.bias": "vector", "down.weight": "hidden", "down.bias": "vector"}
    assert roles(found) == expected


def rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_a_gain_used_as_one_plus_w() -> None:
    found = seen(lambda n: {"gain": nn.Parameter(torch.zeros(n))}, lambda net, x: rms(x) * (1.0 + net.gain))
    assert (found.specs["gain"].role, found.specs["gain"].shift) == ("vector", 1.0)


@pytest.mark.parametrize("power", [0.5, -0.5, 1.0])
def test_a_power_of_the_width_in_the_forward_is_read_off(power: float) -> None:
    """√d on embeddings as in Gemma, d^-½ before the head as in T5."""
    found = seen(lambda n: {"up": nn.Linear(n, n, bias=False)}, lambda net, x: net.up(x) * x.shape[-1] ** power)
    assert found.specs["up.weight"].constant == pytest.approx(power)
    plan = mt.plan(
        family(lambda n: {"up": nn.Linear(n, n, bias=False)}, lambda net, x: net.up(x) * x.shape[-1] ** power),
        Scale(64),
    )
    row = next(row for row in plan.rows if row.name == "up.weight")
    assert row.lr_factor == pytest.approx(4**-power / 4)  # hidden: 1/m_in, and the number divided out


def test_autocast_copies_are_the_parameter() -> None:
    by_hand = seen(lambda n: {"w": parameter(n, n)}, lambda net, x: (x.bfloat16() @ net.w.bfloat16()).float())
    assert roles(by_hand) == {"w": "hidden"}

    def autocast(net: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.up(x)

    assert roles(seen(lambda n: {"up": nn.Linear(n, n, bias=False)}, autocast)) == {"up.weight": "hidden"}
