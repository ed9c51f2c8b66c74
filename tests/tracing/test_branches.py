"""Residual branches however their sum is written; what cannot be recognized as one is refused where depth needs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe

from ..helpers import families

Way = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def rows(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x))


def everywhere(x: torch.Tensor) -> torch.Tensor:
    return rows(x)[:, None, None].expand_as(x)


def matrices(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.down.weight.T.expand(len(x), -1, -1)


# What adds the branch to the stream, given the block, the stream x and the branch's hidden layer h; and what ends it.
SUMS: dict[str, tuple[Way, str]] = {
    "add": (lambda b, x, h: x + b.down(h), "down"),
    "sub": (lambda b, x, h: x - b.down(h), "down"),
    "rsub": (lambda b, x, h: torch.rsub(-b.down(h), x), "down"),
    "Python's sum": (lambda b, x, h: sum([x, b.down(h)]), "down"),  # type: ignore[arg-type, return-value]
    "addcmul": (lambda b, x, h: torch.addcmul(x, b.gain, b.down(h)), "gain"),
    "addcmul_": (lambda b, x, h: x.clone().addcmul_(b.gain, b.down(h), value=2), "gain"),
    "addcdiv": (lambda b, x, h: torch.addcdiv(x, b.down(h), torch.tensor(2.0), value=0.5), "down"),
    "lerp": (lambda b, x, h: torch.lerp(x, b.down(h), b.gain), "gain"),
    "addmm": (
        lambda b, x, h: torch.addmm(x.flatten(0, 1), h.flatten(0, 1), b.down.weight.T, alpha=0.5).view_as(x),
        "down",
    ),
    "baddbmm": (lambda b, x, h: torch.baddbmm(x, h, matrices(b, x)), "down"),
    "baddbmm_": (lambda b, x, h: x.clone().baddbmm_(h, matrices(b, x)), "down"),
    "stack and sum": (lambda b, x, h: torch.stack([x, b.down(h)]).sum(0), "down"),
    "stack and mean": (lambda b, x, h: torch.stack([x, b.down(h)], -1).mean(-1, keepdim=True)[..., 0], "down"),
    "index_add": (lambda b, x, h: x.index_add(0, rows(x), b.down(h)), "down"),
    "index_add_": (lambda b, x, h: x.clone().index_add_(0, rows(x), b.down(h)), "down"),
    "scatter_add": (lambda b, x, h: x.scatter_add(0, everywhere(x), b.down(h)), "down"),
    "index_put": (lambda b, x, h: x.index_put((rows(x),), b.down(h), accumulate=True), "down"),
}
NOT_RECOGNIZED: dict[str, Way] = {
    "cat and sum": lambda b, x, h: torch.cat([x[None], b.down(h)[None]]).sum(0),
    "_foreach_add": lambda b, x, h: torch._foreach_add([x], [b.down(h)])[0],
    "einsum": lambda b, x, h: torch.einsum("kbtn,k->btn", torch.stack([x, b.down(h)]), torch.ones(2)),
    "logaddexp": lambda b, x, h: torch.logaddexp(x, b.down(h)),
    "a scaled stream": lambda b, x, h: torch.baddbmm(x, h, matrices(b, x), beta=0.5),
}


class Block(nn.Module):
    def __init__(self, width: int, ways: list[Way]) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.gain = nn.Parameter(torch.full((width,), 0.1))
        self.ways = ways

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for way in self.ways:
            x = way(self, x, self.up(self.norm(x)).relu())
        return x


class Net(nn.Module):
    """Blocks whose branches are added in the given ways, one after the other and then from the start."""

    def __init__(self, scale: Scale, ways: list[Way]) -> None:
        super().__init__()
        self.first = nn.Linear(5, scale.width)
        self.blocks = nn.ModuleList(Block(scale.width, [ways[i % len(ways)]]) for i in range(scale.depth))
        self.readout = nn.Linear(scale.width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


def family(build: Callable[[Scale], nn.Module], depth: int = 2) -> mt.Family:
    torch.manual_seed(0)
    return mt.Family(build, torch.randn(3, 7, 5), lambda m, x: m(x).square().mean(), Scale(16, depth=depth))


@pytest.mark.parametrize("way", SUMS)
def test_a_branch_is_seen_however_it_is_added(way: str) -> None:
    """In every other layer: the plan then covers all of them."""
    spelled, end = SUMS[way]
    of = family(lambda s: Net(s, [SUMS["add"][0], spelled]))
    found = observe(of)
    ends = {name for name, spec in found.specs.items() if spec.ends_branch}
    assert {name.removesuffix(".weight") for name in ends} == {"blocks.0.down", f"blocks.1.{end}"}
    inside = {name for name, spec in found.specs.items() if spec.inside}
    all_of = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("norm.weight", "up.weight", "up.bias", "down.weight")}
    assert inside == all_of | ({"blocks.1.gain"} if end == "gain" else set())
    assert {spec.role for name, spec in found.specs.items() if "up.weight" in name or "down" in name} == {"hidden"}
    assert not found.notes or "gain" in found.notes[0]
    planned = {row.name: row for row in mt.plan(of, Scale(16, depth=8), "completep", observation=found).rows}
    assert planned["blocks.5.up.weight"].eps_factor == pytest.approx(1 / 4)


@pytest.mark.parametrize("way", SUMS)
def test_the_values_are_those_of_the_model(way: str) -> None:
    from mutransfer.tracing.tracer import OpTracer

    of = family(lambda s: Net(s, [SUMS[way][0]]))
    model = of.build(of.base)
    with torch.no_grad(), OpTracer(model):
        watched = model(of.batch)
    torch.testing.assert_close(watched, model(of.batch))


@pytest.mark.parametrize("way", NOT_RECOGNIZED)
def test_a_stack_of_which_only_a_part_was_recognized_is_refused(way: str) -> None:
    for build in (
        lambda s: Net(s, [SUMS["add"][0], NOT_RECOGNIZED[way]]),
        lambda s: Net(s, [NOT_RECOGNIZED[way], SUMS["add"][0]]),
    ):
        of = family(build)
        found = observe(of)
        odd = 1 if build(of.base).blocks[0].ways == [SUMS["add"][0]] else 0
        assert f"blocks.{odd}.down.weight was found on no residual branch, but " in str(found.notes)
        assert mt.plan(of, Scale(64, depth=2), "completep", observation=found)
        with pytest.raises(mt.RequestError, match="residual branches need a factor"):
            mt.plan(of, Scale(16, depth=4), "completep", observation=found)


class Half(nn.Module):
    """In every layer the first branch is a plain sum, and the second one is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.plain, self.norm = nn.Linear(width, width, bias=False), nn.RMSNorm(width)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.plain(self.norm(x))
        return NOT_RECOGNIZED["logaddexp"](self, x, self.norm(x))


def test_layers_of_which_only_a_part_was_recognized_are_refused() -> None:
    of = family(lambda s: nn.Sequential(nn.Linear(5, s.width), *(Half(s.width) for _ in range(s.depth))))
    assert any(note.startswith("1.down.weight was found on no residual branch") for note in observe(of).notes)
    with pytest.raises(mt.RequestError, match="residual branches need a factor"):
        mt.plan(of, Scale(16, depth=4), "completep")


class Listed(nn.Module):
    """One list of linear layers: the first and the last are no branches, and have other shapes."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        sizes = [16, *[scale.width] * (scale.depth + 1), 3]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *between, last = self.layers
        x = first(torch.cat([x, x, x, x[..., :1]], -1))  # as wide as the base
        for layer in between:
            x = x + layer(x.relu())
        return last(x)


def test_layers_in_one_list_with_the_first_and_the_last() -> None:
    found = observe(family(Listed))
    assert [name for name, spec in found.specs.items() if spec.ends_branch and "weight" in name] == [
        "layers.1.weight",
        "layers.2.weight",
    ]
    assert not found.open_branches
    assert not found.notes


class Recurrent(nn.Module):
    def __init__(self, width: int, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.rnn = kind(width, width, batch_first=True)  # type: ignore[call-arg]
        self.readout = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.rnn(self.first(x))[0])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])
def test_a_recurrence_is_no_residual_branch(kind: type[nn.Module]) -> None:
    """h' = tanh(W x + V h) adds to its input at every step; the steps are no layers."""
    found = observe(family(lambda s: Recurrent(s.width, kind)))
    assert not [name for name, spec in found.specs.items() if spec.ends_branch or spec.inside]
    assert not found.open_branches


def test_a_branch_that_nothing_carries_is_refused_by_name() -> None:
    """A spectral norm has no size to scale, and the bias behind it is not all that the branch adds."""

    def build(scale: mt.Scale) -> nn.Module:
        model = families.transformer().build(scale)
        for block in model.blocks:  # type: ignore[union-attr]
            block.ffn.down.bias = nn.Parameter(torch.zeros(block.ffn.down.out_features))
            nn.utils.parametrizations.spectral_norm(block.ffn.down)
        return model

    of = mt.Family(build, families.token_batch(), families.loss, mt.Scale(32, 2), "normal")
    with pytest.raises(mt.RequestError, match=r"no parameter can absorb it in the branch of blocks\.\d\.ffn"):
        mt.plan(of, mt.Scale(32, 8), "completep")


class Mixture(nn.Module):
    """Experts whose results are weighted and added up in one einsum, or values that are weighted by attention alone."""

    def __init__(self, width: int, attention: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        if attention:
            self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        else:
            self.gate = nn.Linear(width, 4, bias=False)
            self.up, self.down = (nn.Parameter(torch.randn(4, width, width) / width**0.5) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        if hasattr(self, "q"):
            return x + (self.q(h) @ self.k(h).mT / h.shape[-1] ** 0.5).softmax(-1) @ self.v(h)
        each = torch.einsum("btd,edf->btef", h, self.up).relu()
        each = torch.einsum("btef,efd->bted", each, self.down)
        return x + torch.einsum("bted,bte->btd", each, self.gate(h).softmax(-1))


@pytest.mark.parametrize("attention", [False, True])
def test_a_branch_that_ends_in_weighted_values(attention: bool) -> None:
    of = family(lambda s: nn.Sequential(nn.Linear(5, s.width), *(Mixture(s.width, attention) for _ in range(s.depth))))
    found = observe(of).specs
    end = "v.weight" if attention else "down"
    assert {name for name, spec in found.items() if spec.ends_branch} == {f"{i}.{end}" for i in (1, 2)}
    assert {name for name, spec in found.items() if spec.inside} == {n for n in found if not n.startswith("0.")}
    planned = {row.name: row for row in mt.plan(of, Scale(16, depth=8), "completep").rows}
    assert planned[f"5.{end}"].gauge == 0.25
