"""Linear layers that read the same input are one product in fused trainings, where a model allows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mutransfer as mt
from mutransfer.proxies.load import cross_entropy
from mutransfer.proxies.training import Training
from mutransfer.sweeps.vectorized.batch_training import Slot, VectorizedTraining

from ...helpers.apart import plans, together
from ...helpers.blobs import blobs

STEPS, BATCH = 5, 4


class Branches(nn.Module):
    """Layers of one shape, of which the subclasses read the same input in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(64, 16)
        self.one, self.two, self.three = (nn.Linear(16, 16, bias=name != "two") for name in ("one", "two", "three"))
        self.readout = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.branches(torch.relu(self.input(x.flatten(1))))))

    def branches(self, h: Tensor) -> Tensor:
        return self.one(h) * self.two(h).sigmoid() + self.three(h)


class Merged(Branches):
    """What two layers return is viewed in a way that only contiguous tensors allow."""

    def branches(self, h: Tensor) -> Tensor:
        return super().branches(h) + self.one(h).view(-1).view_as(h)


class Twice(Branches):
    """Two layers read one input, and one of them another input as well."""

    def branches(self, h: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(h) + self.two(h))) + self.three(-h)


class Named(Branches):
    """Arguments by name, and a product that is not taken in the order of the weights."""

    def branches(self, h: Tensor) -> Tensor:
        third = nn.functional.linear(bias=self.three.bias, weight=self.three.weight, input=h)
        return third * self.one(h) + self.two(h)


@pytest.mark.parametrize(
    ("model", "parts"),
    [(Branches, (3,)), (Named, (3,)), (Merged, (1, 1, 1)), (Twice, (1, 1, 1))],
)
def test_layers_that_read_the_same_input(model: type[Branches], parts: tuple[int, ...]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        data = blobs("images", noise=1, held_out=8)
        of_model = mt.Family(
            build=lambda scale: model(), batch=data.batch(0, BATCH, 0), loss=cross_entropy, base=mt.Scale(16, 1),
            roles={"*": "finite"},
        )  # fmt: skip
        planned = [mt.plan(of_model, of_model.base, recipe=mt.Recipe(lr=2.0**-k, clip=1.0)) for k in (6, 4)]
        slots = [Slot(each, seed) for seed, each in enumerate(planned)]
        fused = VectorizedTraining(of_model, slots, data, steps=STEPS, batch_size=BATCH)
        assert fused.groups["one.weight"].joint == parts
        fused.advance(STEPS)
        losses = fused.validate([1, 0]), fused.validate([1])
        for seed, each in enumerate(planned):
            alone = Training(of_model, each, data, steps=STEPS, batch_size=BATCH, seed=seed)
            alone.advance(STEPS)
            assert losses[0][1 - seed] == pytest.approx(alone.validate(), rel=1e-12)
        assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("transformer", ["attention.q attention.k attention.v", "ffn.up ffn.gate"]),
        ("grouped", ["attention.k attention.v", "ffn.up ffn.gate"]),  # fewer keys and values than queries
        ("llama", ["self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"]),
    ],
)
def test_queries_keys_and_values_and_gates(name: str, wanted: list[str]) -> None:
    fused = together(name, [Slot(plans(name)[0], 0)])
    parts = [names for group in fused.groups.values() for names in group.parts if len(names) > 1]
    found = {" ".join(".".join(name.split(".")[-3:-1]) for name in names) for names in parts}
    assert found == set(wanted)
    assert len(parts) == 2 * len(wanted)  # in each of two layers


def test_a_product_that_all_layers_have_taken_is_not_kept() -> None:
    from mutransfer.sweeps.vectorized.step import JOINT, Group, JointProducts
    from mutransfer.sweeps.vectorized.updates import Kind

    group = Group(Kind("adam"), ("a", "b"), 0, (2,))
    members = {name: each[0] for name, each in group.members(torch.randn(1, 2, 8, 4)).items()}
    x = torch.randn(3, 4)
    with JointProducts({JOINT + "a": members[JOINT + "a"]}, members, {"a": group}) as mode:
        a = nn.functional.linear(x, members["a"])
        assert len(mode._products[id(members[JOINT + "a"])][1]) == 1
        b = nn.functional.linear(x, members["b"])
        assert mode._products[id(members[JOINT + "a"])][1] == {}
    assert torch.allclose(a, x @ members["a"].T)
    assert torch.allclose(b, x @ members["b"].T)
