"""Roles, axes and initializations are seen, not guessed: every way of writing the same layer reads the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe
from mutransfer.tracing.specs import ParamSpec

from ..helpers import families

FEATURES = 5


def family(build: Callable[[int], nn.Module], batch: Any = None, base: int = 16) -> mt.Family:
    """A family whose loss is the mean square of the model's output."""
    batch = torch.zeros(3, 7, FEATURES) if batch is None else batch
    return mt.Family(lambda s: build(s.width), batch, lambda model, x: model(x).square().mean(), Scale(width=base))


class Middle(nn.Module):
    """Linear, then one ``weight`` used by ``apply``, then a readout; the weight's axes are what a test looks at."""

    def __init__(self, width: int, weight: torch.Tensor, apply: Callable[..., torch.Tensor], out: int) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, width, bias=False)
        self.weight = nn.Parameter(weight)
        self.readout = nn.Linear(out, 3, bias=False)
        self.apply_weight = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.apply_weight(self.first(x), self.weight))


def middle(shape: Callable[[int], tuple[int, ...]], apply: Callable[..., torch.Tensor], grow: int = 2) -> ParamSpec:
    def build(width: int) -> nn.Module:
        return Middle(width, torch.randn(shape(width)), apply, grow * width)

    return observe(family(build)).specs["weight"]


def roles(of: mt.Family) -> dict[str, str]:
    return {name: spec.role for name, spec in observe(of).specs.items()}


MLP_ROLES = {
    "input.weight": "input",
    "input.bias": "vector",
    "hidden.0.weight": "hidden",
    "hidden.0.bias": "vector",
    "hidden.1.weight": "hidden",
    "hidden.1.bias": "vector",
    "readout.weight": "output",
    "readout.bias": "finite",
}
NORM = {"weight": "vector", "bias": "vector"}
RESNET_ROLES = {
    "stem.weight": "input",
    **{f"blocks.{i}.norm{j}.{name}": role for i in (0, 1) for j in (1, 2) for name, role in NORM.items()},
    **{f"blocks.{i}.conv{j}.weight": "hidden" for i in (0, 1) for j in (1, 2)},
    "norm.weight": "vector",
    "norm.bias": "vector",
    "readout.weight": "output",
    "readout.bias": "finite",
}
BLOCK = {
    "norm1": "vector",
    "attention.q": "hidden",
    "attention.k": "hidden",
    "attention.v": "hidden",
    "attention.out": "hidden",
    "norm2": "vector",
    "ffn.up": "hidden",
    "ffn.gate": "hidden",
    "ffn.down": "hidden",
}


def transformer_roles(without: tuple[str, ...] = (), **changes: str) -> dict[str, str]:
    outside = {"embedding.weight": "input", "norm.weight": "vector", "readout.weight": "output"}
    block = BLOCK | {name.replace("_", ".", 1): role for name, role in changes.items()}
    names = {f"blocks.{i}.{name}.weight": role for i in (0, 1) for name, role in block.items()}
    return {name: role for name, role in (outside | names).items() if not any(part in name for part in without)}


def test_roles_of_the_mlp() -> None:
    assert roles(families.mlp()) == MLP_ROLES


def test_roles_of_the_resnet() -> None:
    assert roles(families.resnet()) == RESNET_ROLES


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({}, transformer_roles()),
        ({"ffn": "gelu"}, transformer_roles(without=("gate",))),
        ({"kv_share": 2, "head_dim": 8}, transformer_roles()),
        ({"kv_heads": 1}, transformer_roles(attention_k="bottleneck", attention_v="bottleneck")),
        ({"tied": True}, transformer_roles(without=("readout",))),
        ({"head_dim": None, "heads": 2}, transformer_roles()),
        ({"head_dim": None, "heads": 4, "kv_heads": 2}, transformer_roles()),
        ({"qk_norm": True}, transformer_roles(attention_q_norm="finite", attention_k_norm="finite")),
        (
            {"qk_norm": True, "head_dim": None, "heads": 2},
            transformer_roles(attention_q_norm="vector", attention_k_norm="vector"),
        ),
    ],
    ids=["plain", "gelu", "kv_share", "kv_heads", "tied", "heads", "gqa heads", "qk_norm", "qk_norm heads"],
)
def test_roles_of_the_transformer(shape: dict[str, Any], expected: dict[str, str]) -> None:
    assert roles(families.transformer(width=32, **shape)) == expected


def test_axes_grow_as_built() -> None:
    specs = observe(families.transformer(width=32, kv_heads=1)).specs
    assert specs["embedding.weight"].axes == ("gather", "out")
    assert specs["embedding.weight"].grows == (False, True)
    assert specs["blocks.0.attention.k.weight"].grows == (False, True)
    assert specs["blocks.0.ffn.down.weight"].grows == (True, True)
    assert specs["readout.weight"].grows == (False, True)


def test_ties_and_what_carries_them() -> None:
    seen = observe(families.transformer(tied=True)).specs
    assert {name for name, spec in seen.items() if spec.tied} == {"embedding.weight"}
    assert seen["embedding.weight"].carriers == {"norm.weight"}
    assert not any(spec.tied for spec in observe(families.transformer()).specs.values())


@pytest.mark.parametrize(
    ("shape", "queries", "ratio"),
    [
        ({}, "q.weight", 1),
        ({"head_dim": None, "heads": 2}, "q.weight", 2),
        ({"head_dim": None, "heads": 2, "qk_norm": True}, "q_norm.weight", 2),
        ({"head_dim": None, "heads": 4, "kv_heads": 2}, "q.weight", 2),
    ],
)
def test_attention_is_seen_with_what_carries_its_queries(shape: dict[str, Any], queries: str, ratio: int) -> None:
    seen = observe(families.transformer(width=32, **shape))
    assert seen.queries == {f"blocks.{i}.attention.{queries}" for i in (0, 1)}
    assert seen.heads.ratio == ratio
    assert observe(families.mlp()).heads.dim is None


SAME_MATRIX: dict[str, tuple[Callable[[int], tuple[int, ...]], Callable[..., torch.Tensor], tuple[str, str]]] = {
    "F.linear": (lambda n: (2 * n, n), F.linear, ("out", "in")),
    "x @ W": (lambda n: (n, 2 * n), lambda x, w: x @ w, ("in", "out")),
    "x @ W.T": (lambda n: (2 * n, n), lambda x, w: x @ w.T, ("out", "in")),
    "transposed Conv1D": (
        lambda n: (n, 2 * n),
        lambda x, w: torch.addmm(x.new_zeros(w.shape[1]), x.flatten(0, 1), w).unflatten(0, x.shape[:2]),
        ("in", "out"),
    ),
    "einsum oi": (lambda n: (2 * n, n), lambda x, w: torch.einsum("bti,oi->bto", x, w), ("out", "in")),
    "einsum io": (lambda n: (n, 2 * n), lambda x, w: torch.einsum("bti,io->bto", x, w), ("in", "out")),
    "bmm over an expanded batch": (lambda n: (n, 2 * n), lambda x, w: x.bmm(w.expand(3, -1, -1)), ("in", "out")),
    "matvec by example": (
        lambda n: (2 * n, n),
        lambda x, w: torch.stack([w.mv(row) for row in x.flatten(0, 1)]),
        ("out", "in"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", SAME_MATRIX)
def test_a_hidden_matrix_is_one_however_it_is_written(way: str) -> None:
    shape, apply, axes = SAME_MATRIX[way]
    spec = middle(shape, apply)
    assert spec.role == "hidden"
    assert spec.axes == axes
    # FFN 2n wide, width 4x, and the inner size 8x: each axis by its own ratio
    target = (32 * 8, 16 * 4) if axes == ("out", "in") else (16 * 4, 32 * 8)
    assert spec.multipliers(target) == (4, 8)


def test_a_stack_of_experts_has_a_fixed_first_axis() -> None:
    spec = middle(lambda n: (3, n, 2 * n), lambda x, w: x.bmm(w))
    assert (spec.role, spec.axes) == ("hidden", ("each", "in", "out"))
    assert spec.multipliers((3, 64, 64)) == (4, 2)


class Convolutions(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv1d(FEATURES, width, 3)
        self.depthwise = nn.Conv1d(width, width, 3, groups=width)
        self.grouped = nn.Conv1d(width, width, 1, groups=width // 4)
        self.full = nn.Conv1d(width, width, 1, groups=4)
        self.up = nn.ConvTranspose1d(width, 2 * width, 2)
        self.head = nn.Conv1d(2 * width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.depthwise(self.stem(x)))
        return self.head(self.up(self.full(x)))


def test_convolutions() -> None:
    """Depthwise and fixed group width: fan-in does not grow, so input. A transposed one's fan-in is axis 0."""
    specs = observe(family(Convolutions, batch=torch.zeros(2, FEATURES, 9))).specs
    assert {name.split(".")[0]: spec.role for name, spec in specs.items() if name.endswith("weight")} == {
        "stem": "input",
        "depthwise": "input",
        "grouped": "input",
        "full": "hidden",
        "up": "hidden",
        "head": "output",
    }
    assert specs["up.weight"].multipliers((16 * 2, 32 * 8, 2)) == (2, 8)
    assert specs["full.weight"].multipliers((64, 16, 1)) == (4, 4)
    assert specs["depthwise.weight"].multipliers((64, 1, 3)) == (1, 4)


class Positions(nn.Module):
    def __init__(self, width: int, looked_up: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        if looked_up:
            self.table = nn.Embedding(7, width)
        else:
            self.positions = nn.Parameter(torch.randn(7, width) * 0.02)
        self.gain = nn.Parameter(torch.ones(width))
        self.scalar = nn.Parameter(torch.ones(()))
        self.readout = nn.Linear(width, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = self.table(torch.arange(7)) if hasattr(self, "table") else self.positions
        return self.readout((self.embedding(tokens) + positions) * self.gain) * self.scalar


@pytest.mark.parametrize(("looked_up", "name"), [(True, "table.weight"), (False, "positions")])
def test_position_tables_gains_and_scalars(looked_up: bool, name: str) -> None:
    tokens = torch.zeros(2, 7, dtype=torch.long)
    specs = observe(family(lambda width: Positions(width, looked_up), batch=tokens)).specs
    expected = {"embedding.weight": "input", name: "input", "gain": "vector", "scalar": "finite"}
    expected |= {"readout.weight": "output", "readout.bias": "finite"}
    assert {name: spec.role for name, spec in specs.items()} == expected
    assert specs[name].multipliers((7, 64)) == (1, 4)


def test_a_fixed_rank_in_the_middle_is_a_bottleneck() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, width), nn.Linear(width, 2), nn.Linear(2, width), nn.Linear(width, 3))

    found = {name: role for name, role in roles(family(build)).items() if name.endswith("weight")}
    assert found == {"0.weight": "input", "1.weight": "bottleneck", "2.weight": "input", "3.weight": "output"}


@pytest.mark.parametrize(
    ("apply", "operation"),
    [
        (lambda x, w: x * w.cumsum(0)[0], "cumsum"),
        (lambda x, w: x * w.softmax(-1)[0], "_softmax"),
        (lambda x, w: x @ torch.linalg.qr(w).Q, "linalg_qr"),
    ],
)
def test_an_unknown_use_is_refused(apply: Callable[..., torch.Tensor], operation: str) -> None:
    with pytest.raises(RequestError, match=rf"role of weight \[16, 16\]: it enters the operation '{operation}'"):
        middle(lambda n: (n, n), apply, grow=1)


def test_two_roles_for_one_matrix_are_refused() -> None:
    with pytest.raises(RequestError, match=r"weight \[16, 16\] is used as bottleneck and as input"):
        middle(lambda n: (n, 16), lambda x, w: x * (x @ w).sum() + (x.new_ones(16) @ w.T), grow=1)


def test_an_unused_parameter_is_refused() -> None:
    with pytest.raises(RequestError, match=r"weight \[16, 4\] is never used in the forward pass"):
        middle(lambda n: (n, 4), lambda x, w: x, grow=1)


def test_a_parameter_at_one_width_only_is_refused() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, width), nn.Linear(width, 3, bias=width > 16))

    with pytest.raises(RequestError, match=r"1\.bias exists at one width but not at the other"):
        observe(family(build))


def test_what_is_not_a_model_or_a_loss_is_refused() -> None:
    with pytest.raises(RequestError, match=r"returned int: return a torch\.nn\.Module"):
        observe(mt.Family(lambda s: 3, torch.zeros(1), lambda m, b: b.sum(), Scale(8)))  # type: ignore[arg-type, return-value]
    linear = mt.Family(lambda s: nn.Linear(FEATURES, s.width), torch.zeros(2, FEATURES), lambda m, x: m(x), Scale(8))
    with pytest.raises(RequestError, match="return a tensor with one entry"):
        observe(linear)


def test_a_model_that_does_not_build_or_run_is_refused() -> None:
    with pytest.raises(RequestError, match="does not run on its example batch"):
        observe(family(lambda width: nn.Linear(FEATURES + 1, width)))
    with pytest.raises(RequestError, match="ZeroDivisionError"):
        observe(family(lambda width: nn.Linear(FEATURES, width // 0)))


def test_an_axis_that_changed_without_growing_is_refused() -> None:
    spec = observe(families.mlp()).specs["input.weight"]
    with pytest.raises(RequestError, match=r"axis 1 of input\.weight is 65 in the target and 64 in the base"):
        spec.multipliers((64, 65))
    with pytest.raises(RequestError, match=r"input\.weight has shape \[64\] in the target"):
        spec.multipliers((64,))


def test_two_head_dims_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first = nn.Linear(FEATURES, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)[:, None]
            part = h[..., :4]
            wide, narrow = F.scaled_dot_product_attention(h, h, h), F.scaled_dot_product_attention(part, part, part)
            return wide.mean() + narrow.mean()

    with pytest.raises(RequestError, match=r"attention layers differ in head dim \(\[4, 16\]\)"):
        observe(family(Two))


def test_watching_does_not_change_the_model_or_the_random_numbers() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    observe(families.transformer())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.extended
def test_a_huge_plan_needs_no_memory() -> None:
    """4 hidden layers of 65 536 units would be 64 GiB; the plan takes less than 300 MB and 20 s beside torch itself."""
    code = """
import resource, time, torch
import mutransfer as mt
from mutransfer.coord_check import record  # everything imported before the clock starts
from mutransfer.proxies.models import MLP
def rss(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def family(width):
    return mt.Family(lambda s: MLP(64, s.width, s.depth, 10), torch.zeros(2, 64), lambda m, x: m(x).mean(), mt.Scale(width, 5))
mt.plan(family(8), mt.Scale(16, 5))
before, begun = rss(), time.perf_counter()
plan = mt.plan(family(32768), mt.Scale(65536, 5))
print(rss() - before, time.perf_counter() - begun, plan.rows[2].shape[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    megabytes, seconds, width = map(float, done.stdout.split())
    assert width == 65536
    assert megabytes < 300
    assert seconds < 20
