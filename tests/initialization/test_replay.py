"""What is no plain distribution is made again from its operations: tables to the bit, draws anew."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from mutransfer.initialization import Init

from ..helpers.watched import N, drawn, saved, seen


def inverse_softplus() -> torch.Tensor:
    """Mamba's bias of its time step."""
    dt = torch.exp(torch.rand(N) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def forgetting() -> torch.Tensor:
    bias = torch.zeros(4 * N)
    bias[N : 2 * N] = 1
    return bias


def halves() -> torch.Tensor:
    weight = nn.Parameter(torch.empty(3, 2 * N, N))
    with torch.no_grad():
        for part, std in zip(weight.chunk(2, dim=1), (0.1, 0.5), strict=True):
            part.normal_(std=std)
    return weight


def overlapping() -> torch.Tensor:
    weight = torch.zeros(N, N)
    weight[:8].normal_()
    weight[4:12] *= 3
    return weight


def double_precision() -> torch.Tensor:
    """Built under another default type than it is drawn again under; a third of the way float32 would not reach 0."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return (torch.linspace(0, 1, N) - 1 / 3).float()
    finally:
        torch.set_default_dtype(before)


def mixed() -> torch.Tensor:
    weight = torch.randn(N, N)
    weight[::3] *= 2
    weight[:, 5].zero_()
    weight[7, 9:11] = torch.tensor([3.0, 4.0])
    return weight


def onto_itself() -> torch.Tensor:
    table = torch.arange(9.0).view(3, 3)
    return table.copy_(table.expand(3, 3))


TABLES: dict[str, Callable[[], torch.Tensor]] = {
    "linspace": lambda: torch.linspace(0, 1, N),
    "state space": lambda: torch.log(torch.arange(1, 17).float().repeat(N, 1)),
    "literal": lambda: torch.tensor([3.0, 4.0, -math.inf]),
    "numpy": lambda: torch.from_numpy(np.arange(6.0).reshape(2, 3)).float(),
    "eye_": lambda: nn.init.eye_(torch.empty(4, 6)),
    "dirac_": lambda: nn.init.dirac_(torch.empty(80, 80, 3)),
    "few dirac_": lambda: nn.init.dirac_(torch.empty(4, 4, 3)),
    "a constant in parts": forgetting,
    "onto itself": onto_itself,
    "double precision": double_precision,
    "strided": lambda: torch.arange(N).float().view(8, 8).t(),
    "sliced": lambda: torch.arange(N).float().view(8, 8)[1:3, ::2],
    "a value asked for": lambda: torch.zeros(3) + torch.linspace(0, 1, 5)[2].item(),
}
RANDOM: dict[str, Callable[[], torch.Tensor]] = {
    "inverse softplus": inverse_softplus,
    "orthogonal_": lambda: nn.init.orthogonal_(torch.empty(N, 2 * N), gain=3),
    "sparse_": lambda: nn.init.sparse_(torch.empty(N, N), 0.5, std=0.1),
    "clamped": lambda: torch.randn(N, N).clamp(-1, 1),
    "a table of stds": lambda: torch.randn(N, N) * torch.linspace(0, 1, N),
    "repeated": lambda: torch.randn(1, N).expand(N, N).clone(),
    "stacked": lambda: torch.cat([torch.randn(N, N), torch.zeros(N, N)]),
    "_foreach": lambda: torch._foreach_mul([torch.randn(N, N)], 2.0)[0],
    "default type": lambda: torch.randn(N, N).double() ** 3,
    "mixed": mixed,
    "overlapping": overlapping,
    "halves": halves,
    "a row": lambda: nn.Embedding(N, N, padding_idx=3).weight,
    "a truncated slice": lambda: nn.init.trunc_normal_(torch.zeros(N, N)[:7]),
}


@pytest.mark.parametrize("way", TABLES)
def test_a_table_is_made_again_to_the_bit(way: str) -> None:
    found = saved(seen(TABLES[way]))
    assert found.fixed
    assert found.std == 0
    assert torch.equal(drawn(found, tuple(TABLES[way]().shape)), TABLES[way]())
    assert torch.equal(drawn(found.scaled(-2), tuple(TABLES[way]().shape)), -2 * TABLES[way]())


@pytest.mark.parametrize("way", RANDOM)
def test_any_other_random_initialization_is_drawn_again(way: str) -> None:
    """Row by row and column by column the draw has the constructor's own mean and mean square."""
    found = saved(seen(RANDOM[way]))
    own = torch.stack([RANDOM[way]().detach().float() for _ in range(40)])
    again = torch.stack([drawn(found, tuple(own.shape[1:]), seed) for seed in range(40)])
    assert not found.fixed
    assert not torch.equal(again[0], again[1])
    assert torch.equal(again[0], drawn(found, tuple(own.shape[1:]), 0))
    for dim in (1, -1):
        for moment in (1, 2):
            runs = [(x**moment).double().mean(dim) for x in (own, again)]
            error = torch.sqrt(sum(run.var(0) for run in runs) / 40)
            assert ((runs[0].mean(0) - runs[1].mean(0)).abs() <= 7 * error + 1e-6).all(), (dim, moment)


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    found = saved(seen(RANDOM["orthogonal_"]))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    drawn(found, (N, 2 * N))
    assert torch.equal(torch.rand(3), expected)


def test_parts_are_seen_as_parts() -> None:
    """So that a shard is drawn without the whole; a program would need it."""
    row = saved(seen(RANDOM["a row"]))
    assert (row.kind, row.b, row.parts[0].box, row.parts[0].init) == (
        "normal",
        1,
        ((3, 1, 1), (0, N, 1)),
        Init("constant", 0),
    )
    fused = saved(seen(halves))
    assert (fused.b, fused.parts[0].init.b, fused.parts[0].box) == (0.1, 0.5, ((0, 3, 1), (N, N, 1), (0, N, 1)))
    bias = saved(seen(forgetting))
    assert [(part.box, part.init.a) for part in bias.parts] == [(((N, N, 1),), 1)]


def test_copies_of_one_draw_stay_copies() -> None:
    """Equal rows have the moments of independent ones: only the program tells them apart."""
    again = drawn(saved(seen(RANDOM["repeated"])), (N, N))
    assert (again == again[0]).all()
    assert again[0].unique().numel() == N


def test_tiles_of_a_large_parameter() -> None:
    """No two tiles are alike, and a part lies where it was seen, in whatever tile."""
    weight = drawn(saved(seen(lambda: nn.Embedding(40, 5000, padding_idx=33).weight)), (40, 5000))
    assert (weight == 0).all(1).nonzero().flatten().tolist() == [33]
    assert weight.unique().numel() > 0.98 * 39 * 5000  # float32 normals do meet
    assert weight[torch.arange(40) != 33].std().item() == pytest.approx(1, rel=0.01)
