"""The private names of torch and Optuna that the package relies on: each stands in one place and does what is expected of it."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib import metadata
from pathlib import Path

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from packaging.requirements import Requirement
from packaging.version import Version

from mutransfer import _torch_internals as of_torch
from mutransfer.sweeps import _optuna_internals as of_optuna

ROOT = Path(__file__).parents[1]
FOLDERS = ("mutransfer", "proxies", "sweeps", "reports")
HOMES = ("mutransfer/_torch_internals.py", "sweeps/_optuna_internals.py")
# An underscore after a package's own name, on an operator, a study or a trial.
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._(?!_)\w|\boptuna(\.\w+)*\._|\._(schema|cdata|overloadpacket|trial_id|study_id|thread_local)\b"
    r"|\bstudy\._|\bdistribution\._"
)


def code_of(path: Path) -> str:
    """A module without its strings, whose operators (``aten._grouped_mm``) and loggers have underscores of their own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return re.sub(r"torch\.ops\.\w+\.\w+", "operator", ast.unparse(tree))


def test_private_names_stand_in_one_module_each() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in HOMES
        for match in PRIVATE.finditer(code_of(path))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line", ["from torch._guards import x", "study._storage", "func._schema.name", "import optuna._a"]
)
def test_a_private_name_is_seen(line: str) -> None:
    assert PRIVATE.search(line)


@pytest.mark.parametrize("name", ["torch", "optuna"])
def test_the_installed_version_is_within_the_bounds(name: str) -> None:
    """A newer one is let in when these tests have seen it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = [each for each in map(Requirement, project["dependencies"]) if each.name == name]
    assert any(each.operator == "<" for each in bound.specifier)
    assert Version(metadata.version(name)).base_version in bound.specifier


def test_fake_tensors_have_storages_and_modes() -> None:
    with of_torch.FakeTensorMode() as mode:
        tensor = torch.empty(4, 3)
        assert isinstance(tensor, of_torch.FakeTensor)
        assert of_torch.storage_id(tensor) == of_torch.storage_id(tensor.T)
        assert of_torch.storage_id(tensor) == of_torch.storage_id(tensor.untyped_storage())
        assert of_torch.storage_id(tensor) != of_torch.storage_id(tensor.clone())
        assert of_torch.detect_fake_mode(tensor) is mode
        assert mode in of_torch.current_dispatch_modes()
        with of_torch.disable_current_modes():
            assert type(torch.ones(2)) is torch.Tensor
            assert not of_torch.current_dispatch_modes()
        with pytest.raises(of_torch.DataDependentOutputException):
            tensor[0, 0].item()


def test_operators_name_themselves_and_what_they_write() -> None:
    plain, inplace = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
    assert of_torch.operator_name(plain) == "aten::add"
    assert of_torch.overload_packet(plain) is torch.ops.aten.add
    assert isinstance(plain, of_torch.OpOverload)
    assert [each.name for each in of_torch.argument_schemas(plain)] == ["self", "other", "alpha"]
    assert (of_torch.is_mutable(plain), of_torch.is_mutable(inplace)) == (False, True)
    assert isinstance(torch.ops.higher_order.cond, of_torch.HigherOrderOperator)


def test_inductor_is_left_alone_unless_torch_is_restricted_to_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, has_avx512, given in (
        ("AVX512", True, {}), ("AVX2", False, {}), ("DEFAULT", False, {}), ("AVX2", True, {"cpp.march": "haswell"}),
    ):  # fmt: skip
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda found=has_avx512: found)
        assert of_torch.inductor_options() == given


def test_the_default_device_is_known() -> None:
    assert torch.zeros in of_torch.device_constructors()
    assert of_torch.default_device() is None
    try:
        torch.set_default_device("meta")
        assert of_torch.default_device().device.type == "meta"
    finally:
        torch.set_default_device(None)


def test_muons_constants_are_those_of_its_defaults() -> None:
    coefficients, steps, eps = of_torch.NEWTON_SCHULZ
    defaults = torch.optim.Muon([torch.zeros(2, 2)]).defaults
    assert (coefficients, steps, eps) == (defaults["ns_coefficients"], defaults["ns_steps"], defaults["eps"])
    assert of_torch.muon_lr(0.5, "original", torch.Size([8, 2])) == pytest.approx(1.0)


def test_multiplying_in_place() -> None:
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    of_torch.multiply_all_(tensors, torch.tensor(0.5))
    assert [each.tolist() for each in tensors] == [[0.5] * 2, [1.0] * 3]


def test_studies_and_trials_show_their_storage() -> None:
    study = optuna.create_study()
    storage, study_id = of_optuna.storage_of(study), of_optuna.study_id(study)
    trial = study.ask()
    assert storage.get_study_name_from_id(study_id) == study.study_name
    assert storage.get_trial(of_optuna.trial_id(trial)).number == trial.number
    of_optuna.forget_cached_trials(study)
    assert isinstance(storage.get_all_studies()[0], of_optuna.FrozenStudy)


def test_distributions_say_what_they_contain() -> None:
    assert of_optuna.contains(FloatDistribution(0.0, 1.0), 0.5)
    assert not of_optuna.contains(FloatDistribution(0.0, 1.0), 1.5)
    assert of_optuna.contains(CategoricalDistribution(["a", "b"]), 1)


def test_a_sampler_sees_what_a_view_shows() -> None:
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(n_startup_trials=1, seed=0))
    space = {"x": FloatDistribution(0.0, 1.0)}
    for _ in range(3):
        study.tell(study.ask(space), 1.0)
    seen: list[int] = []

    def change(trials):  # type: ignore[no-untyped-def]
        seen.append(len(trials))
        return [each for each in trials if each.state is TrialState.COMPLETE]

    view = of_optuna.StudyView(study, change)
    asked = study.ask()
    trial = study.get_trials()[asked.number]
    study.sampler.sample_relative(view, trial, space)  # type: ignore[arg-type]
    assert seen
    assert view.study_name == study.study_name
