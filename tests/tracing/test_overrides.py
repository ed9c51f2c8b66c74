"""Roles by name pattern, wherever a model is named; a misspelt one is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.io import write_json
from mutransfer.planning.target import TargetConfig
from mutransfer.proxies.load import load_family
from mutransfer.recipe import Scale
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import RunContext
from mutransfer.sweeps.results import target_of_run
from mutransfer.tracing.roles import ROLES, roles_from

from ..helpers import families
from ..helpers.small import SMALL, experiment

MODEL = """
import torch
from torch import nn

def build(width, depth):
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))

batch = (torch.ones(2, 8), torch.zeros(2, dtype=torch.long))
"""


def role_of(family: mt.Family, name: str) -> str:
    return {row.name: row.role for row in mt.plan(family, family.base).rows}[name]


def test_the_first_pattern_that_fits_counts() -> None:
    family = replace(families.mlp(), roles={"readout.w*": "bottleneck", "input.w*": "vector", "*ut.weight": "output"})
    assert role_of(family, "readout.weight") == "bottleneck"
    assert role_of(family, "input.weight") == "vector"
    assert role_of(family, "hidden.0.weight") == "hidden"


@pytest.mark.parametrize(
    ("name", "role", "words"),
    [
        *(("hidden.0.weight", role, "2 of its axes grow .*: use hidden") for role in ROLES if role != "hidden"),
        ("input.weight", "hidden", "1 of its axes grow .*: use input or vector or output or bottleneck"),
        ("input.weight", "finite", "1 of its axes grow"),
        ("readout.bias", "output", "0 of its axes grow .*: use finite"),
    ],
)
def test_a_role_that_the_axes_contradict_is_refused(name: str, role: str, words: str) -> None:
    """Both ratios would go into one factor: lr / m² for a hidden matrix called output."""
    with pytest.raises(RequestError, match=f"{name} was given the role {role}, but {words}"):
        mt.plan(replace(families.mlp(), roles={name: role}), Scale(64, 3))


def test_two_growing_axes_that_nothing_sums_over_can_be_an_input() -> None:
    class Gains(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.gain = torch.nn.Linear(8, width * width), torch.nn.Parameter(torch.ones(width, width))
            self.out = torch.nn.Linear(width, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out((self.up(x).unflatten(-1, self.gain.shape) * self.gain).mean(-1))

    batch = torch.ones(2, 8), torch.zeros(2, dtype=torch.long)
    family = mt.Family(lambda s: Gains(s.width), batch, families.loss, Scale(4), roles={"gain": "input"})
    assert role_of(family, "gain") == "input"


def test_what_fits_nothing_or_is_no_role_is_refused() -> None:
    for roles, words in [
        ({"hiden.0.weight": "hidden"}, "'hiden.0.weight' matches no parameter of mlp: did you mean 'hidden.0.weight'"),
        ({"hidden.0.weight": "hiden"}, "the role 'hiden', which is unknown: did you mean 'hidden'"),
        (["hidden"], "give a dictionary from name pattern to role"),
    ]:
        with pytest.raises(RequestError, match=words):
            mt.plan(replace(families.mlp(), roles=roles), Scale(64, 3))  # type: ignore[arg-type]


class Odd(torch.nn.Module):
    """Three parameters that go into operations without a rule."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.ones(7, width))
        self.square, self.bias = (torch.nn.Parameter(torch.ones(*[width] * n)) for n in (2, 1))
        self.out = torch.nn.Linear(width, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.table.cumsum(1)[x] + self.square.cumsum(0).cumsum(1)[0] + self.bias.cumsum(0))


@pytest.mark.parametrize(
    ("name", "likely", "others"),
    [
        ("table", "input", "output, bottleneck"),
        ("square", "hidden", "input"),
        ("bias", "vector", "output, bottleneck"),
    ],
)
def test_the_role_that_a_refusal_suggests_is_one_that_the_shape_can_have(name: str, likely: str, others: str) -> None:
    batch = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    roles = {"table": "input", "square": "hidden", "bias": "vector"}
    family = mt.Family(lambda s: Odd(s.width), batch, families.loss, Scale(8))
    rest = {key: role for key, role in roles.items() if key != name}
    with pytest.raises(RequestError, match=rf"roles=\{{'{name}': '{likely}'\}} \(or {others}\)"):
        mt.plan(replace(family, roles=rest), Scale(16))
    assert role_of(replace(family, roles=rest | {name: likely}), name) == likely


def test_roles_stand_beside_a_build_function_and_those_asked_for_go_before(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(MODEL + "roles = {'2.weight': 'bottleneck', '0.weight': 'vector'}\n")
    family = load_family(f"{file}:build", None, Scale(16, 1))
    assert (role_of(family, "2.weight"), role_of(family, "0.weight")) == ("bottleneck", "vector")
    family = load_family(f"{file}:build", None, Scale(16, 1), roles={"2.w*": "output", "0.weight": "input"})
    assert (role_of(family, "2.weight"), role_of(family, "0.weight")) == ("output", "input")
    file.write_text(MODEL + "roles = ['2.weight']\n")
    with pytest.raises(RequestError, match=r"roles next to .*model.py:build is \['2.weight'\]"):
        load_family(f"{file}:build", None, Scale(16, 1))


def test_the_command_lines_form() -> None:
    assert roles_from(["*.a=hidden", "b=c.weight=output"], "--role") == {"*.a": "hidden", "b=c.weight": "output"}
    for text in ("hidden", "=hidden", "a="):
        with pytest.raises(RequestError, match="is not of the form PATTERN=ROLE"):
            roles_from([text], "--role")


def test_roles_travel_from_the_experiment_to_every_run_and_the_target(tmp_path: Path) -> None:
    roles = {"readout.weight": "bottleneck"}
    asked = experiment(roles=roles, proxy={"width": 8, "depth": 3})
    asked.save(tmp_path / "experiment.yaml")
    assert Experiment.load(tmp_path / "experiment.yaml") == asked
    for given, expected in ((asked, "bottleneck"), (experiment(proxy={"width": 8, "depth": 3}), "output")):
        planned = RunContext(given).plan(given.proxy_scale.with_(width=32), "mup", given.recipe)
        assert {row.name: row.role for row in planned.rows}["readout.weight"] == expected
    folder = RunFolder(tmp_path)
    write_json(folder.best, json.loads(asked.recipe.model_dump_json()))
    target = TargetConfig.load(target_of_run(folder, 32).save(tmp_path / "target.json"))
    assert {row.name: row.role for row in target.plan.rows}["readout.weight"] == "bottleneck"
    assert target.provenance["roles"] == roles
    assert SMALL["model"] == "mlp"
