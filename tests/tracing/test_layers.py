"""Layers of a deeper model are matched by pattern, and a deep base is known from its first layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe, observe_in_full
from mutransfer.tracing.run import LAYERS
from mutransfer.tracing.specs import match_layers

from ..helpers import families
from ..helpers.sets import extended_but


def names(*kinds: str, stack: str = "blocks") -> dict[str, int]:
    """One layer per kind: an attention layer "a", a dense one "d", a router one "r"."""
    parts = {"a": ("q.weight", "out.weight"), "d": ("up.weight", "down.weight"), "r": ("router.weight", "up.weight")}
    return {f"{stack}.{i}.{part}": 2 for i, kind in enumerate(kinds) for part in parts[kind]} | {"norm.weight": 1}


def layers(target: dict[str, int], base: dict[str, int]) -> list[int]:
    """Which layer of the base each layer of the target comes from."""
    found = match_layers(target, base)
    pairs = {int(a.split(".")[1]): int(b.split(".")[1]) for a, b in found.items() if a.startswith("blocks")}
    return [pairs[i] for i in sorted(pairs)]


@pytest.mark.parametrize(
    ("target", "base", "expected"),
    [
        ("dddd", "dd", [0, 1, 0, 1]),
        ("dd", "dddd", None),
        ("adadad", "ad", [0, 1, 0, 1, 0, 1]),  # a period
        ("drrrrr", "drr", [0, 1, 2, 2, 1, 2]),  # the first layer is its own kind: 3 would be like 0 and is not
        ("ddda" * 2, "ddda", [0, 1, 2, 3, 0, 1, 2, 3]),
        ("da", "ad", [1, 0]),  # matched by what is in it, not by number
    ],
)  # fmt: skip
def test_layers_are_matched_by_pattern(target: str, base: str, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(RequestError, match=r"blocks\.2\.\w+\.weight is in the base but has no counterpart"):
            match_layers(names(*target), names(*base))
    else:
        assert layers(names(*target), names(*base)) == expected


def test_a_kind_of_layer_that_the_base_lacks_is_refused() -> None:
    with pytest.raises(
        RequestError, match=r"blocks\.1\.q\.weight is in the target, but nothing in the base looks like it"
    ):
        match_layers(names("d", "a"), names("d", "d"))
    with pytest.raises(RequestError, match=r"head\.weight is in the target, but nothing"):
        match_layers(names("d") | {"head.weight": 2}, names("d", "d"))


def test_stacks_within_layers() -> None:
    """Stages of blocks, as in a ResNet: each stage grows by itself."""
    base = {f"stages.{i}.{j}.weight": 4 for i in (0, 1) for j in (0, 1)}
    target = {f"stages.{i}.{j}.weight": 4 for i in (0, 1) for j in range(5)}
    found = match_layers(target, base)
    assert [found[f"stages.1.{j}.weight"] for j in range(5)] == [f"stages.1.{j % 2}.weight" for j in range(5)]


@pytest.mark.parametrize(
    "shape", extended_but([{}, {"tied": True}, {"qk_norm": True, "head_dim": None, "heads": 2}, {"kv_heads": 1}], {})
)
def test_a_deep_base_is_known_from_its_first_layers(shape: dict[str, object]) -> None:
    family = families.transformer(width=32, depth=2 * LAYERS + 1, **shape)
    short, whole = observe(family), observe_in_full(family)
    for name, spec in whole.specs.items():
        assert spec.meets <= short.specs[name].meets  # of a layer's norm it knows the name in every layer
        assert replace(spec, meets=frozenset()) == replace(short.specs[name], meets=frozenset())
    assert replace(short, specs={}) == replace(whole, specs={})


class Different(nn.Module):
    """Layers of one kind, but for the last, which is wider."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sizes = [width] * (depth - 1) + [3 * width]
        self.first = nn.Linear(8, width)
        self.ups = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.downs = nn.ModuleList(nn.Linear(size, width) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(up(x).relu())
        return x


def test_layers_unlike_the_first_are_not_taken_for_them() -> None:
    family = mt.Family(
        lambda s: Different(s.width, s.depth), torch.zeros(2, 8), lambda m, x: m(x).mean(), Scale(16, LAYERS + 2)
    )
    seen, whole = observe(family), observe_in_full(family)
    for name, spec in whole.specs.items():
        assert replace(spec, meets=frozenset()) == replace(seen.specs[name], meets=frozenset())
    assert seen.specs[f"ups.{LAYERS + 1}.weight"].shape == (48, 16)


def test_a_models_own_depth_dependent_init_is_taken_at_the_base() -> None:
    """GPT-2's 1/√(2L) on branch ends: with the fold's 1/m_L besides it, the depth would count twice."""

    def build(scale: Scale) -> nn.Module:
        model = Different(scale.width, scale.depth)
        for down in model.downs:
            nn.init.normal_(down.weight, std=0.02 / (2 * scale.depth) ** 0.5)  # type: ignore[arg-type]
        return model

    for base_depth in (2, LAYERS + 4):
        family = mt.Family(build, torch.zeros(2, 8), lambda m, x: m(x).mean(), Scale(16, base_depth))
        plan = mt.plan(family, Scale(16, 4 * base_depth), "completep")
        at_base = 0.02 / (2 * base_depth) ** 0.5
        assert {row.name: row.init.std for row in plan.rows}["downs.0.weight"] == pytest.approx(at_base / 4)


def flat(width: int, depth: int, last: int) -> nn.Module:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *hidden, nn.Linear(width, last))


@pytest.mark.parametrize("base", [1, 2, 3])
@pytest.mark.parametrize(("width", "depth"), [(64, 4), (16, 5), (16, LAYERS + 6)])
@pytest.mark.parametrize("last", [5, 16])
def test_one_list_of_layers_with_the_input_and_the_readout(base: int, width: int, depth: int, last: int) -> None:
    """At another depth the readout has another number; where it is as wide as the base nothing else would tell."""
    family = mt.Family(
        lambda s: flat(s.width, s.depth, last), torch.zeros(2, 8), lambda m, x: m(x).square().mean(), Scale(16, base)
    )
    roles = [row.role for row in mt.plan(family, Scale(width, depth)).rows if row.name.endswith("weight")]
    assert roles == ["input", *["hidden"] * depth, "output"]
    deep = mt.Family(family.build, family.batch, family.loss, Scale(16, LAYERS + 3))
    found = [spec.role for name, spec in observe(deep).specs.items() if name.endswith("weight")]
    assert found == ["input", *["hidden"] * (LAYERS + 3), "output"]
