"""K fused trainings are K separate ones in float64, whatever K, order and neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import mutransfer as mt
from mutransfer.optimizers import muon
from mutransfer.proxies.load import cross_entropy
from mutransfer.sweeps.vectorized import updates
from mutransfer.sweeps.vectorized.batch_training import Slot, VectorizedTraining

from ...helpers.apart import apart, distance, plans, together
from ...helpers.blobs import blobs
from ...helpers.sets import extended_but

MODELS = ["mlp", "transformer", "grouped", "resnet", "normed", "llama"]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


PAIRS = [(name, optimizer) for name in MODELS for optimizer in ("adamw", "sgd", "muon")]


MIXED = [("skip", "adamw"), ("skip", "sgd")]  # forward multipliers, and columns that count apart in clipping


# What takes a second or less, and a transformer.
QUICK = [
    *(pair for pair in PAIRS if pair[0] in ("mlp", "normed")),
    ("resnet", "adamw"),
    ("transformer", "adamw"),
    *MIXED,
]
OTHERS = [("mlp", "adam"), ("mlp", "muon-match-rms-adamw")]


@pytest.mark.parametrize(("name", "optimizer"), extended_but([*PAIRS, *MIXED, *OTHERS], *QUICK, *OTHERS))
def test_fused_trainings_are_separate_trainings(name: str, optimizer: str) -> None:
    own = plans(name, optimizer)
    fused = together(name, [Slot(plan, seed) for seed, plan in enumerate(own)])
    fused.advance(20)
    losses = fused.validate(range(len(own)))
    for seed, plan in enumerate(own):
        training, loss = apart(name, plan, seed)
        assert losses[seed] == pytest.approx(loss, rel=1e-10)
        assert distance(training, fused, seed) < 1e-10


PRUNED = ["mlp", "transformer", "resnet"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", extended_but(PRUNED, "mlp", "resnet"))
def test_pruned_fused_trainings_are_separate_trainings(name: str, optimizer: str) -> None:
    """Each has its own density, and slot 1 none; what is kept and what begins later as well."""
    own = plans(name, optimizer, pruned=True)
    fused = together(name, [Slot(plan, seed) for seed, plan in enumerate(own)])
    fused.advance(7)
    fused.keep([4, 1, 0])
    fused.begin(1, Slot(own[3], seed=5))
    fused.begin(2, Slot(own[0], seed=0), fused.snapshots([2])[0])
    fused.advance(13)
    losses = fused.validate([0, 1, 2])
    for index, (plan, seed, steps) in enumerate(((own[4], 4, 20), (own[3], 5, 13), (own[0], 0, 20))):
        training, loss = apart(name, plan, seed, steps)
        assert losses[index] == pytest.approx(loss, rel=1e-10)
        assert distance(training, fused, index) < 1e-10


def bits(fused: VectorizedTraining, index: int) -> list[bytes]:
    return [each[index].numpy().tobytes() for part in (fused.now.trained, fused.now.buffers) for each in part.values()]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", extended_but(["mlp", "skip", "resnet", "transformer"], "mlp"))
def test_an_update_in_pieces_is_the_same(name: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = plans(name, optimizer)
    ends = []
    for piece in (2**18, 150):  # 150: of one model, or of some rows of one
        monkeypatch.setattr(updates, "PIECE", piece)
        fused = together(name, [Slot(plan, seed) for seed, plan in enumerate(own)])
        fused.advance(5)
        ends.append({**fused.now.trained, **fused.now.buffers})
    for key, whole in ends[0].items():
        assert (ends[1][key] - whole).norm() <= 1e-13 * whole.norm()  # the gradient's norm is summed in another order


class Summed(torch.nn.Module):
    """Two matrices that are only used in their sum: autograd returns one tensor as the gradient of both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (torch.nn.Parameter(torch.randn(16, 64) / 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((self.one + self.other) @ x.flatten(1).T).T


def test_a_gradient_that_two_parameters_share_is_clipped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = blobs("images", noise=1, held_out=8).batch(0, 4, 0)
    summed = mt.Family(
        build=lambda scale: Summed(), batch=batch, loss=cross_entropy, base=mt.Scale(16, 1),
        roles={"*": "finite"},
    )  # fmt: skip
    planned = mt.plan(summed, summed.base, optimizer="sgd", recipe=mt.Recipe(lr=0.1, clip=1e-3))
    ends = []
    for piece in (2**18, 150):
        monkeypatch.setattr(updates, "PIECE", piece)
        data = blobs("images", noise=1, held_out=8)
        fused = VectorizedTraining(summed, [Slot(planned, 0), Slot(planned, 1)], data, steps=3, batch_size=4)
        fused.advance(3)
        ends.append(fused.now.trained)
    for key, whole in ends[0].items():
        assert (ends[1][key] - whole).norm() <= 1e-13 * whole.norm()


@pytest.mark.parametrize("name", extended_but(["mlp", "transformer", "normed"], "mlp", "normed"))
def test_any_number_in_any_order(name: str) -> None:
    own = plans(name)
    for chosen in ([3], [4, 1], [2, 0, 4, 1, 3], [1, 1, 1]):
        fused = together(name, [Slot(own[k], seed=k) for k in chosen])
        fused.advance(20)
        for index, k in enumerate(chosen):
            assert distance(apart(name, own[k], k)[0], fused, index) < 1e-10


@pytest.mark.parametrize("name", extended_but(MODELS, "mlp", "resnet", "normed"))
def test_those_that_are_kept_go_on_and_new_ones_begin_at_the_beginning(name: str) -> None:
    own = plans(name)
    fused = together(name, [Slot(plan, seed=0) for plan in own])
    fused.advance(7)
    fused.keep([4, 2, 0])
    fused.begin(1, Slot(own[3], seed=5))  # over 2, seven steps behind the others
    fused.advance(13)
    assert [slot.step for slot in fused.slots] == [20, 13, 20]
    assert distance(apart(name, own[4], 0)[0], fused, 0) < 1e-10
    assert distance(apart(name, own[3], 5, 13)[0], fused, 1) < 1e-10
    assert distance(apart(name, own[0], 0)[0], fused, 2) < 1e-10
    losses = fused.validate([1, 0])
    assert losses == pytest.approx([apart(name, own[3], 5, 13)[1], apart(name, own[4], 0)[1]], rel=1e-10)


@pytest.mark.parametrize("name", extended_but(MODELS, "mlp", "resnet", "normed"))
def test_neighbours_do_not_matter_to_the_bit(name: str) -> None:
    own = plans(name)

    def run(spoil: float) -> VectorizedTraining:
        fused = together(name, [Slot(plan, seed=0) for plan in own[:3]])
        fused.advance(3)
        for each in fused.now.trained.values():
            each[1] *= spoil
        fused.advance(17)
        return fused

    calm, perturbed, lost = run(1.0), run(1.5), run(math.nan)
    assert bits(calm, 1) != bits(perturbed, 1)
    assert [slot.finite for slot in lost.slots] == [True, False, True]
    assert math.isnan(lost.validate([0, 1])[1])
    for index in (0, 2):
        assert bits(calm, index) == bits(perturbed, index) == bits(lost, index)


def test_a_lost_training_ends_where_it_would_by_itself() -> None:
    own = plans("mlp", "sgd")
    wild = mt.Plan(**{**vars(own[0]), "recipe": own[0].recipe.with_(clip=None)})
    wild = mt.Plan(**{**vars(wild), "rows": tuple(replace(row, lr=1e150) for row in wild.rows)})
    fused = together("mlp", [Slot(own[1], 0), Slot(wild, 0), Slot(wild, 1, frozenset({4}))])
    fused.advance(20)
    training, loss = apart("mlp", wild, 0)
    assert math.isnan(loss)
    assert [slot.step for slot in fused.slots] == [20, training.step, 4]


# transformers' Llama normalizes in float32 in any case.
COMPILED = {
    ("mlp", "adamw"): 1e-10, ("mlp", "sgd"): 1e-10, ("mlp", "muon"): 1e-10, ("transformer", "adamw"): 1e-10,
    ("transformer", "sgd"): 1e-10, ("grouped", "adamw"): 1e-10, ("resnet", "adamw"): 1e-10, ("normed", "adamw"): 1e-10,
    ("llama", "sgd"): 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        pytest.param(*pair, marks=pytest.mark.extended if pair == ("mlp", "adamw") else pytest.mark.slow)
        for pair in COMPILED
    ],
)
def test_compiled_trainings_are_separate_trainings(name: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A compiler sums in another order, and the rounding of Muon's bfloat16 or float32 would hide what is to be seen.
    for module in (muon, updates):
        monkeypatch.setattr(module, "iteration_dtype", lambda device: torch.float64)
    own = plans(name, optimizer)
    fused = together(name, [Slot(plan, seed) for seed, plan in enumerate(own)], compile=True)
    program = fused.step
    fused.advance(7)
    assert fused.step is not program
    fused.advance(3)
    fused.begin(1, Slot(own[1], seed=9))
    fused.advance(10)
    losses = fused.validate(range(len(own)))
    for index, plan in enumerate(own):
        training, loss = apart(name, plan, index) if index != 1 else apart(name, plan, 9, 10)
        assert losses[index] == pytest.approx(loss, rel=COMPILED[name, optimizer])
        assert distance(training, fused, index) < COMPILED[name, optimizer]
    fused.keep([2, 0])
    assert fused.step is program
