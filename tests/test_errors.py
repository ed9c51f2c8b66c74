"""The kinds of refusals: each handler catches the one that it is for and lets every other pass."""

from __future__ import annotations

import ast
import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer import errors, price
from mutransfer.cli.models import load_own
from mutransfer.coord_check import cache as check_cache
from mutransfer.errors import (
    BuildError,
    DataError,
    FrameError,
    InitError,
    LayerError,
    MissingBaseError,
    ModelError,
    RequestError,
    RoleError,
)
from mutransfer.export import export
from mutransfer.planning import target
from mutransfer.proxies.load import load_family
from mutransfer.reports import page
from mutransfer.reports.contents import RunContents
from mutransfer.schemas import COORDINATES
from mutransfer.tracing.specs import Observation

from .helpers import families

ROOT = Path(__file__).parents[1]
observing = importlib.import_module("mutransfer.tracing.observe")  # the package has a function of that name
KINDS = sorted(
    (each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, RequestError)),
    key=lambda each: each.__name__,
)


def raising(error: Exception) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise error

    return refuse


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_request_error_that_crosses_processes(kind: type[RequestError]) -> None:
    assert kind.__name__ in errors.__all__
    again = pickle.loads(pickle.dumps(kind("the width is 0: give a positive one.")))
    assert type(again) is kind
    assert isinstance(again, mt.RequestError)
    assert str(again) == "the width is 0: give a positive one."


def handlers_of_all() -> list[str]:
    """Handlers that catch every `RequestError` and do something other than raise it again."""
    found = []
    for folder in ("mutransfer", "proxies", "sweeps", "reports"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ExceptHandler) or node.type is None:
                    continue
                names = {each.id for each in ast.walk(node.type) if isinstance(each, ast.Name)}
                if "RequestError" in names and not isinstance(node.body[-1], ast.Raise):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_nobody_but_the_command_line_catches_every_kind() -> None:
    assert [each.partition(":")[0] for each in handlers_of_all()] == ["mutransfer/cli/__init__.py"]


# The data is the same for every model, and a role is a statement about the model: neither is a matter of the depth.
@pytest.mark.parametrize("kind", [RoleError, DataError])
@pytest.mark.parametrize(
    "run",
    [
        lambda seen: observing.with_depth_constants(families.mlp(), seen),
        lambda seen: observing.at_target(families.transformer(head_dim=None, heads=2), seen, mt.Scale(64)),
    ],
    ids=["with_depth_constants", "at_target"],
)
def test_only_a_model_that_cannot_be_built_is_traced_at_another_depth(
    run: Callable[[Observation], object], kind: type[RequestError], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = observing.observe(families.transformer(head_dim=None, heads=2))
    monkeypatch.setattr(observing, "forward", raising(kind("planted")))
    with pytest.raises(kind, match="planted"):
        run(seen)


def test_a_depth_that_cannot_be_built_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observing.observe(families.mlp())
    monkeypatch.setattr(observing, "forward", raising(BuildError("planted")))
    assert observing.with_depth_constants(families.mlp(), seen).depths_compared


@pytest.mark.parametrize("kind", [BuildError, RoleError, LayerError, InitError, DataError, RequestError])
def test_only_a_shallow_model_that_cannot_be_observed_is_replaced_by_the_whole(
    kind: type[RequestError], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families.mlp(depth=6)
    depths: list[int] = []

    def watch(family: mt.Family) -> str:
        depths.append(family.base.depth)
        if family.base.depth < 6:
            raise kind("planted")
        return "whole"

    monkeypatch.setattr(observing, "observe_in_full", watch)
    if issubclass(kind, ModelError):
        assert observing.observe(family) == "whole"
        assert depths == [4, 6]
    else:
        with pytest.raises(kind, match="planted"):
            observing.observe(family)


def test_a_role_error_of_the_whole_model_is_raised() -> None:
    class Unused(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
            self.idle = nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    family = mt.Family(
        lambda s: Unused(s.width, s.depth), torch.ones(2, 8), lambda m, x: m(x[:, :1].expand(2, m.idle.in_features)).sum(),
        mt.Scale(8, 6),
    )  # fmt: skip
    with pytest.raises(RoleError, match=r"idle\.weight \[8, 8\] is never used"):
        mt.plan(family, family.base)


def test_only_layers_without_a_counterpart_end_the_extension_in_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observing.observe(families.mlp())
    monkeypatch.setattr(observing, "match_layers", raising(LayerError("planted")))
    assert observing.extended_in_depth(seen, {}, {}) is None
    monkeypatch.setattr(observing, "match_layers", raising(RoleError("planted")))
    with pytest.raises(RoleError, match="planted"):
        observing.extended_in_depth(seen, {}, {})


def test_what_a_users_build_or_loss_refuses_is_a_build_error() -> None:
    base = families.mlp()
    for family in (
        mt.Family(raising(RequestError("planted")), base.batch, base.loss, base.base),
        mt.Family(base.build, base.batch, raising(RequestError("planted")), base.base),
    ):
        with pytest.raises(BuildError, match="planted"):
            mt.plan(family, family.base)


def test_only_a_model_without_a_base_gets_the_one_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\ndef build(width, depth):\n    return torch.nn.Linear(width, 2)\nbatch = torch.ones(2, 8)\n",
        "utf-8",
    )
    with pytest.raises(MissingBaseError, match="has no base width"):
        load_own(f"{file}:build", None, None, 4, None)
    called: list[object] = []

    def refuse(model: str, data: object, base: object, **_: object) -> mt.Family:
        called.append(base)
        # the sentence of the other error, which was once read to tell them apart
        raise DataError("has no base width")

    monkeypatch.setattr("mutransfer.proxies.load.load_family", refuse)
    with pytest.raises(DataError):
        load_own("net.py:build", None, mt.Scale(8), 4, None)
    assert called == [None]


def test_only_a_damaged_frame_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = COORDINATES.frame([])
    cache = check_cache.CheckCache(tmp_path)
    cache.piece(lambda: rows, torch.ones(1))
    (path,) = tmp_path.iterdir()
    path.write_text("damaged", "utf-8")
    assert cache.piece(lambda: rows, torch.ones(1)).empty
    monkeypatch.setattr(check_cache, "COORDINATES", type("Refusing", (), {"read": raising(DataError("planted"))}))
    with pytest.raises(DataError, match="planted"):
        cache.piece(lambda: rows, torch.ones(1))


def test_only_a_frame_with_too_little_in_it_is_left_out_of_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunContents.__new__(RunContents)
    for name, value in {"coordinates": None, "basins": None, "trials": pd.DataFrame()}.items():
        object.__setattr__(run, name, value)
    for name in ("judged_basins", "parameters", "seeds_planned", "maximize"):
        monkeypatch.setattr(RunContents, name, None)
    for name in ("SliceFigure", "ImportanceFigure", "ParallelFigure"):
        monkeypatch.setattr(page, name, raising(FrameError("too few")))
    monkeypatch.setattr(page, "HistoryFigure", lambda *_, **__: "drawn")
    notes: dict[str, str] = {}
    assert page.draw_figures(run, None, None, notes) == {"history": "drawn"}
    assert set(notes) == {"slices", "importances", "parallel"}
    monkeypatch.setattr(page, "HistoryFigure", raising(RoleError("planted")))
    with pytest.raises(RoleError, match="planted"):
        page.draw_figures(run, None, None, {})


def test_only_a_forward_pass_is_repeated_for_real_to_count_it(monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.mlp()
    expected = price.step_cost(family, family.base, family.batch)
    counter, calls = price.FlopCounter, list[None]()

    def first_refused() -> price.FlopCounter:
        calls.append(None)
        if len(calls) == 1:
            raise BuildError("planted")
        return counter()

    monkeypatch.setattr(price, "FlopCounter", first_refused)
    assert price.step_cost(family, family.base, family.batch) == expected
    monkeypatch.setattr(price, "build", raising(BuildError("planted")))
    with pytest.raises(BuildError, match="planted"):
        price.step_cost(family, family.base, family.batch)


def test_only_a_model_that_cannot_be_built_is_searched_for_regularizers_at_its_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(target, "build", raising(RoleError("planted")))
    with pytest.raises(RoleError, match="planted"):
        target.regularizers(families.mlp())


def test_a_hint_does_not_depend_on_the_words_of_another(tmp_path: Path) -> None:
    """The known names may themselves begin with the words that the hints begin with."""
    assert errors.closest("didd", ["did", "known"]) == "did"
    assert errors.closest("zzzz", ["did", "known"]) is None
    assert errors.nearest("zzzz", ["did", "known"]) == "known names are did, known."
    with pytest.raises(RequestError, match=r"unknown format 'pytorhc': did you mean 'pytorch'\?"):
        export(None, "pytorhc")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"unknown format 'zzz': use --to pytorch\."):
        export(None, "zzz")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"unknown model 'mpl': did you mean 'mlp'\?"):
        load_family("mpl", None, None)
    with pytest.raises(RequestError, match=r"unknown model 'zzz': give a built-in .*path/to/file\.py:name"):
        load_family("zzz", None, None)
