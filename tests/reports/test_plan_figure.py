"""The planned table as a picture: every factor of every role, readable without colour."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from mutransfer.errors import RequestError
from mutransfer.reports import PlanFigure
from mutransfer.reports.style import DIVERGING
from mutransfer.schemas import PARAMETERS


@pytest.fixture
def parameters() -> pd.DataFrame:
    factors = {
        "input": (1.0, 1.0, 1.0, 1 / 16),
        "vector": (np.nan, 1.0, 1.0, 1 / 16),
        "hidden": (1 / 4, 1 / 16, 16.0, 1 / 16),
        "output": (1 / 16, 1 / 16, 16.0, 1.0),
    }
    rows = []
    for role, (init, lr, decay, eps) in factors.items():
        sizes = {"shape": "256x256", "m_in": 16.0, "m_out": 16.0, "init_std": 0.02, "lr": 1e-3, "weight_decay": 0.1}
        told = {"lr_factor": lr, "wd_factor": decay, "eps_factor": eps, "init_factor": init}
        rows += [{"name": f"{role}.{i}", "role": role, **sizes, "eps": 1e-8, **told} for i in range(2)]
    rows[5]["lr_factor"] = 1 / 64  # one hidden parameter grows more
    return PARAMETERS.frame(rows)


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_every_role_and_setting_is_a_number(parameters):
    drawn = PlanFigure(parameters).draw()
    assert texts(drawn) == [
        *("1", "1", "1", "2⁻⁴"),
        *("–", "1", "1", "2⁻⁴"),
        *("2⁻²", "2⁻⁶ to 2⁻⁴", "2⁴", "2⁻⁴"),
        *("2⁻⁴", "2⁻⁴", "2⁴", "1"),
    ]
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == [
        "input (2)", "vector (2)", "hidden (2)", "output (2)",
    ]  # fmt: skip
    assert drawn.axes[0].get_xlabel().startswith("target's value / base model's")


def test_larger_and_smaller_are_told_apart_without_colour(parameters):
    hatches = [cell.get_hatch() for cell in PlanFigure(parameters).draw().axes[0].collections]
    words = texts(PlanFigure(parameters).draw())
    for word, hatch in zip(words, hatches, strict=True):
        assert (hatch == "///") == word.startswith("2⁻"), word
        assert (hatch == "\\\\\\") == (word == "2⁴"), word


def test_distance_is_lightness():
    luminance = np.array([np.dot(DIVERGING(x)[:3], (0.2126, 0.7152, 0.0722)) for x in np.linspace(0, 1, 21)])
    assert (np.diff(luminance[:11]) > 0).all()
    assert (np.diff(luminance[10:]) < 0).all()


def test_csv_redraws_it(parameters, tmp_path):
    figure = PlanFigure(parameters)
    pd.testing.assert_frame_equal(figure.frame(), parameters)
    read = PARAMETERS.read(PARAMETERS.write(parameters, tmp_path / "parameters.csv"))
    assert PlanFigure(read).svg("a") == figure.svg("a")


@pytest.mark.parametrize("name", ["$x_{", "<script>", "日本", "a" * 300])
def test_a_role_of_any_name_is_drawn_behind_the_known_ones(parameters, name):
    parameters["role"] = parameters["role"].replace("input", name)
    figure = PlanFigure(parameters)
    assert "<script" not in figure.svg("a")
    assert list(dict.fromkeys(figure.cells["role"])) == ["vector", "hidden", "output", name]


def test_factors_of_zero_and_settings_that_no_parameter_has(parameters):
    texts_ = texts(PlanFigure(parameters.assign(eps_factor=np.nan, wd_factor=0.0)).draw())
    assert texts_.count("–") == 1 + 4
    assert texts_.count("0") == 4
    PlanFigure(parameters.assign(eps_factor=np.nan, wd_factor=0.0)).png()


def test_no_parameter_is_said(parameters):
    with pytest.raises(RequestError, match=re.escape("run `mutransfer transfer RUN`")):
        PlanFigure(parameters.iloc[:0])
