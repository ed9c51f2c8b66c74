"""Builds as people end them: cast, moved, compiled, left lazy. The plan is that of the plain model, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.coord_check import judge_coordinates
from mutransfer.tracing.observe import observe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, on importing its compiler
X, Y = torch.randn(16, 20), torch.randint(0, 5, (16,))
Build = Callable[[int], nn.Module]


def net(width: int, **where: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(20, width, **where), nn.ReLU(), nn.Linear(width, width, **where), nn.ReLU(), nn.Linear(width, 5, **where)
    )  # fmt: skip


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def family(build: Build, dtype: torch.dtype = torch.float32, loss: Any = loss) -> mt.Family:
    return mt.Family(lambda s: build(s.width), (X.to(dtype), Y), loss, mt.Scale(64))


def planned(of: mt.Family) -> list[dict[str, Any]]:
    return [row.as_row() for row in mt.plan(of, mt.Scale(256)).rows]


def on_meta(width: int) -> nn.Module:
    with torch.device("meta"):
        model = net(width)
    model.to_empty(device="cuda")
    return model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)


def in_double(width: int) -> nn.Module:
    torch.set_default_dtype(torch.float64)
    return net(width)


def on_default_device(width: int) -> nn.Module:
    torch.set_default_device("cuda")
    return net(width)


def with_own_generator(width: int) -> nn.Module:
    model, generator = net(width), torch.Generator("cuda").manual_seed(3)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)  # nn.Linear's own
    return model


def lazy(width: int) -> nn.Module:
    return nn.Sequential(nn.LazyLinear(width), nn.ReLU(), nn.LazyLinear(width), nn.ReLU(), nn.LazyLinear(5))


def lazy_run(width: int) -> nn.Module:
    model = lazy(width)
    model(torch.zeros(2, 20))
    return model


ENDINGS: dict[str, tuple[Build, torch.dtype]] = {
    "to cpu": (lambda n: net(n).to("cpu"), torch.float32),
    "cuda": (lambda n: net(n).cuda(), torch.float32),
    "built on cuda:1": (lambda n: net(n, device="cuda:1"), torch.float32),
    "half": (lambda n: net(n).half(), torch.float16),
    "bfloat16": (lambda n: net(n).to(torch.bfloat16), torch.bfloat16),
    "double": (lambda n: net(n).double(), torch.float64),
    "there and back": (lambda n: net(n).half().float(), torch.float32),
    "type": (lambda n: net(n).type(torch.float64), torch.float64),
    "share_memory": (lambda n: net(n).share_memory(), torch.float32),
    "compile": (lambda n: torch.compile(net(n)), torch.float32),
    "meta, then to_empty": (on_meta, torch.float32),
    "default dtype": (in_double, torch.float64),
    "default device": (on_default_device, torch.float32),
    "its own generator": (with_own_generator, torch.float32),
    "lazy": (lazy, torch.float32),
    "lazy, run in the build": (lazy_run, torch.float32),
    "lazy and half": (lambda n: lazy(n).half().cuda(), torch.float16),
}


@pytest.mark.parametrize(("build", "dtype"), ENDINGS.values(), ids=ENDINGS.keys())
def test_same_plan(build: Build, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype(), torch.get_default_device(), nn.Module._apply, torch.Generator
    assert planned(family(build, dtype)) == planned(family(net))
    assert (torch.get_default_dtype(), torch.get_default_device(), nn.Module._apply, torch.Generator) == before


def test_loss_that_moves_its_batch() -> None:
    def on_cuda(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss(model, (batch[0].cuda(), batch[1].to("cuda:0")))

    assert planned(family(lambda n: net(n).cuda(), loss=on_cuda)) == planned(family(net))


class Tied(nn.Module):
    """An embedding that is the readout, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, width), nn.LayerNorm(width)
        self.readout = nn.Linear(width, 11, bias=False)
        self.readout.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.norm(self.embedding(x)))


@pytest.mark.parametrize("end", [nn.Module.half, nn.Module.double, nn.Module.cuda, torch.compile])
def test_ties_stay(end: Callable[[nn.Module], nn.Module]) -> None:
    tokens = torch.randint(11, (2, 7))

    def tied(build: Build) -> mt.Family:
        return mt.Family(
            lambda s: build(s.width), tokens, lambda m, x: m(x).float().square().mean(), mt.Scale(16)
        )  # fmt: skip

    found = planned(tied(lambda n: end(Tied(n))))
    assert [row["name"] for row in found] == ["embedding.weight", "norm.weight", "norm.bias"]
    assert found == planned(tied(Tied))


def test_channels_last() -> None:
    def build(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Unflatten(1, (5, 2, 2)), nn.Conv2d(5, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.Flatten(),
            nn.Linear(4 * width, 5),
        )  # fmt: skip

    assert planned(family(lambda n: build(n).to(memory_format=torch.channels_last))) == planned(family(build))


def test_weights_of_a_cast_model_are_those_of_the_plain_one() -> None:
    plain, cast = family(net), family(lambda n: net(n).to(torch.bfloat16), torch.bfloat16)
    models = [of.build(mt.Scale(128)) for of in (plain, cast)]
    for of, model in zip((plain, cast), models, strict=True):
        mt.plan(of, mt.Scale(128)).initialize(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)


@pytest.mark.parametrize("build", [lazy, lambda n: torch.compile(net(n))], ids=["lazy", "compiled"])
def test_check_of_real_builds(build: Build) -> None:
    frame = judge_coordinates(family(build), [64, 128, 256], seeds=2, patience=1).coordinates
    assert {*frame[frame["statistic"] == "activation"]["module"]} == {"0", "2", "4"}


def test_lazy_model_that_has_not_run_is_refused_for_real() -> None:
    plan = mt.plan(family(lazy), mt.Scale(128))
    with pytest.raises(
        mt.RequestError, match=r"0\.weight is lazy and has no shape yet: run one batch through the model"
    ):
        plan.initialize(lazy(128))


class Spare(nn.Module):
    """Has a lazy layer that no batch reaches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net, self.spare = net(width), nn.LazyLinear(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_lazy_module_that_the_batch_does_not_reach() -> None:
    with pytest.raises(mt.RequestError, match=r"spare\.weight is lazy.*give its layer in_features"):
        observe(family(Spare))


def test_layer_that_is_filled_nowhere() -> None:
    def build(width: int) -> nn.Module:
        with torch.device("meta"):
            return net(width).to_empty(device="cpu")

    with pytest.raises(mt.RequestError, match=r"0\.weight.*torch.empty, never filled"):
        observe(family(build))


def state() -> tuple[Any, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


class Draws(nn.Module):
    """Draws from every global generator, in its constructor and in its forward pass."""

    def __init__(self, width: int, fails: bool) -> None:
        super().__init__()
        self.net, self.fails = net(width), fails
        random.random(), np.random.rand(), torch.manual_seed(random.randrange(99))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        random.random(), np.random.rand(), torch.manual_seed(5)
        if self.fails:
            raise ValueError("no")
        return self.net(x)


@pytest.mark.parametrize("fails", [False, True])
def test_generators_are_put_back(fails: bool) -> None:
    before = state()
    try:
        mt.plan(family(lambda n: Draws(n, fails)), mt.Scale(128))
    except mt.RequestError:
        assert fails
    assert state() == before
