"""What mup 1.0.0 does where mutransfer goes on: each failure is asserted, so that docs/explanation/robustness.md states facts.

`fully_shard` and `parallelize_module` are in test_distributed.py, the letters of DDP names in test_wrapper_names.py.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import mup
import pytest
import torch
from torch import nn

from ..helpers import annotated, families

LOST = "infshape"


def test_undisturbed_it_trains() -> None:
    """The control: all the failures below are failures of what is done to the model, not of the model."""
    assert annotated.outcome(annotated.model()) == "trains"


def test_deepcopy_loses_the_shapes() -> None:
    assert LOST in annotated.outcome(copy.deepcopy(annotated.model()))


def test_its_parameters_cannot_be_loaded_with_weights_only(tmp_path: Path) -> None:
    """A plain model's can; a whole model unpickled with weights_only=False does keep its shapes."""
    torch.save(dict(families.mlp().build(families.mlp().base).named_parameters()), tmp_path / "plain.pt")
    assert torch.load(tmp_path / "plain.pt", weights_only=True)
    torch.save(dict(annotated.model().named_parameters()), tmp_path / "annotated.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"mup\.infshape"):
        torch.load(tmp_path / "annotated.pt", weights_only=True)
    torch.save(annotated.model(), tmp_path / "model.pt")
    assert annotated.outcome(torch.load(tmp_path / "model.pt", weights_only=False)) == "trains"


def test_assigning_a_state_dict_loses_the_shapes() -> None:
    model = annotated.model()
    model.load_state_dict(annotated.model().state_dict(), assign=True)
    assert LOST in annotated.outcome(model)


def test_materializing_a_meta_model_loses_the_shapes() -> None:
    with torch.device("meta"):
        model = annotated.build()
    mup.set_base_shapes(model, annotated.build(annotated.BASE), delta=annotated.build(2 * annotated.BASE))
    model.to_empty(device="cpu")
    assert LOST in annotated.outcome(model)


def test_export_cannot_trace_the_readout() -> None:
    with pytest.raises(AssertionError, match="set_base_shapes"):
        torch.export.export(annotated.model(), (families.image_batch()[0],))


def test_functional_gradients_cannot_pass_the_readout() -> None:
    model = annotated.model()
    x, y = families.image_batch()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, x), y)

    with pytest.raises(AssertionError, match="set_base_shapes"):
        torch.func.grad(loss)(weights)


def test_weight_norm_replaces_annotated_parameters() -> None:
    model = annotated.model()
    torch.nn.utils.parametrizations.weight_norm(model.readout)  # type: ignore[arg-type]
    assert LOST in annotated.outcome(model)


def test_a_tensor_learning_rate_is_divided_for_every_group() -> None:
    """Silently: `group['lr'] /= width_mult` works in place on the one tensor that all groups share."""
    model = annotated.model()
    number = annotated.rates(mup.MuAdamW(model.parameters(), lr=annotated.LR), model)
    assert number["hidden.0.weight"] == annotated.LR / 2
    assert number["input.weight"] == number["readout.weight"] == annotated.LR
    tensor = annotated.rates(mup.MuAdamW(model.parameters(), lr=torch.tensor(annotated.LR), foreach=False), model)
    assert set(tensor.values()) == {annotated.LR / 2}


def test_without_base_shapes_it_trains_the_standard_parametrization() -> None:
    """Silently: base=None takes the model itself for its base, so that every factor is 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mup.set_base_shapes(annotated.build(), None)
        found = annotated.rates(mup.MuAdamW(model.parameters(), lr=annotated.LR), model)
    assert set(found.values()) == {annotated.LR}


def test_a_bottleneck_is_refused() -> None:
    """A LoRA's A or a router: infinite fan-in, finite fan-out, and no readout."""

    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 4), nn.Linear(4, width), mup.MuReadout(width, 10))

    with pytest.raises(AssertionError, match="infinite fan-in and finite fan-out"):
        mup.set_base_shapes(build(64), build(32), delta=build(16))


class Tied(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.readout = mup.MuSharedReadout(self.embedding.weight, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.embedding(x))


def test_a_tied_readout_with_a_bias_has_a_bias_of_the_wrong_size() -> None:
    model = mup.set_base_shapes(Tied(64), Tied(32), delta=Tied(16))
    assert model.readout.bias.shape == (64,), "the width, where the vocabulary is meant"
    with pytest.raises(RuntimeError, match="size"):
        model(torch.arange(4))
