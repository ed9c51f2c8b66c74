"""Figures of a search: from the frame alone, on no global state, with the diverged trials in them."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import optuna
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from mutransfer.errors import RequestError
from mutransfer.reports import ImportanceFigure, ParallelFigure, SliceFigure
from mutransfer.reports.optuna_study import fence_of, positions, search_space, study_of
from mutransfer.schemas import TRIALS

from ..helpers.sets import extended_but

ALL = (SliceFigure, ImportanceFigure, ParallelFigure)


@pytest.fixture
def searched(many_trials) -> pd.DataFrame:
    return many_trials(120)


def marks(figure: Figure, gid: str) -> list[int]:
    """How many marks each panel has."""
    found = [[len(line.get_xdata()) for line in axes.lines if line.get_gid() == gid] for axes in figure.axes]
    return [sum(counts) for counts in found if counts]


def lost_of(trials: pd.DataFrame) -> int:
    return int(trials["diverged"].sum() + (trials["state"] == "FAIL").sum())


def segments(figure: Figure) -> LineCollection:
    (found,) = (c for c in figure.axes[0].collections if isinstance(c, LineCollection))
    return found


@pytest.mark.parametrize("make", ALL)
def test_csv_redraws_it(make, searched, tmp_path):
    figure = make(searched)
    pd.testing.assert_frame_equal(figure.frame(), searched)
    read = TRIALS.read(TRIALS.write(searched, tmp_path / "trials.csv"))
    assert make(read).svg("a") == figure.svg("a")


@pytest.mark.parametrize("make", ALL)
def test_nothing_global_is_touched(make, searched):
    before = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False), optuna.logging.get_verbosity()
    make(searched).png()
    after = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False), optuna.logging.get_verbosity()
    assert after == before
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs


@pytest.mark.parametrize("make", ALL)
def test_the_users_settings_do_not_change_it(make, searched):
    plain = make(searched).svg("a")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "figure.figsize": (2, 2)}):
        assert make(searched).svg("a") == plain


def test_every_complete_trial_is_in_every_slice(searched):
    figure = SliceFigure(searched)
    drawn = figure.draw()
    complete = searched[(searched["state"] == "COMPLETE") & ~searched["diverged"]]
    beyond = int((complete["value"] > fence_of(complete["value"])).sum())
    assert beyond > 0
    dots = [len(axes.collections[0].get_offsets()) for axes in drawn.axes[: len(figure.names)]]
    assert dots == [len(complete) - beyond] * len(figure.names)
    assert marks(drawn, "beyond") == [beyond] * len(figure.names)
    assert marks(drawn, "lost") == [lost_of(searched)] * len(figure.names)
    assert lost_of(searched) > 0


def test_the_best_trial_has_its_ring(searched):
    drawn = SliceFigure(searched).draw()
    best = searched.loc[searched["value"].where((searched["state"] == "COMPLETE") & ~searched["diverged"]).idxmin()]
    rings = {axes.get_xlabel(): line for axes in drawn.axes for line in axes.lines if line.get_gid() == "best"}
    assert rings["lr"].get_xdata()[0] == best["lr"]
    assert rings["schedule"].get_ydata()[0] == best["value"]


def test_one_diverged_trial_does_not_squash_the_parallel_coordinates(searched):
    assert searched["value"].max() == 30.0
    drawn = ParallelFigure(searched).draw()
    complete = searched[(searched["state"] == "COMPLETE") & ~searched["diverged"]]["value"]
    top = drawn.axes[0].get_ylim()[1]
    assert top < 2.5
    lines = segments(drawn)
    starts = np.array([segment[0, 1] for segment in lines.get_segments()])
    assert len(starts) == len(complete) + lost_of(searched)
    assert (starts == starts.max()).sum() == lost_of(searched)
    solid = sum(dashes is None for _, dashes in lines.get_linestyle())
    assert solid == len(complete)
    assert f"{(complete > fence_of(complete)).sum()} trials with a larger loss" in ParallelFigure(searched).caption


def test_every_line_crosses_the_axes_at_its_values(searched):
    drawn = ParallelFigure(searched).draw()
    main, *others = drawn.axes[: 1 + len(ParallelFigure(searched).names)]
    heights = ParallelFigure(searched).clipped[0].dropna().sort_values(ascending=False, kind="stable")
    lines = np.array(segments(drawn).get_segments())
    np.testing.assert_allclose(lines[:, 0, 1], heights)
    space = search_space(searched)
    for i, (axes, name) in enumerate(zip(others, ParallelFigure(searched).names, strict=True), 1):
        assert axes.get_yscale() == ("log" if getattr(space[name], "log", False) else "linear")
        places = axes.transData.inverted().transform(
            main.transData.transform(np.column_stack([lines[:, i, 0], lines[:, i, 1]]))
        )
        np.testing.assert_allclose(places[:, 1], positions(searched, name)[heights.index], rtol=1e-9, atol=1e-9)
    labels = [label.get_text() for label in others[ParallelFigure(searched).names.index("schedule")].get_yticklabels()]
    assert labels == list(space["schedule"].choices)


def test_a_trial_without_a_value_is_drawn_below_the_range(searched):
    seldom = searched.assign(seldom=searched["lr"].where(searched["number"] % 5 == 0))
    figure = ParallelFigure(seldom)
    drawn = figure.draw()
    axes = drawn.axes[1 + figure.names.index("seldom")]
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < seldom["seldom"].min()
    assert [text.get_text() for text in axes.texts] == ["not set"]
    at = np.array(segments(drawn).get_segments())[:, 1 + figure.names.index("seldom"), 1]
    missing = seldom.loc[figure.clipped[0].dropna().index, "seldom"].isna().sum()
    assert (at == drawn.axes[0].get_ylim()[0]).sum() == missing > 0
    assert "“not set”" in figure.caption
    assert "“not set”" not in ParallelFigure(searched).caption


def test_a_slice_is_on_the_scale_of_its_hyperparameter(searched):
    figure, space = SliceFigure(searched), search_space(searched)
    panels = dict(zip(figure.names, figure.draw().axes, strict=False))
    for name, axes in panels.items():
        assert axes.get_xscale() == ("log" if getattr(space[name], "log", False) else "linear")
        values = positions(searched, name)
        low, high = axes.get_xlim()
        assert low < values.min() < values.max() < high
    assert [label.get_text() for label in panels["schedule"].get_xticklabels()] == ["cosine", "linear", "wsd"]


def test_a_metric_to_maximize_has_its_best_at_the_bottom(searched):
    metric = searched.assign(value=-searched["value"])
    for make in ALL:
        assert make(metric, maximize=True).frame().equals(metric)
    best, other = (next(line for line in make.draw().axes[0].lines if line.get_gid() == "best")
                   for make in (SliceFigure(metric, maximize=True), SliceFigure(searched)))  # fmt: skip
    assert best.get_xydata().tolist() == other.get_xydata().tolist()


@pytest.mark.extended
def test_nothing_imports_pyplot(searched, tmp_path):
    TRIALS.write(searched, tmp_path / "trials.csv")
    code = (
        "import sys; from mutransfer.reports import ImportanceFigure, ParallelFigure, SliceFigure\n"
        "from mutransfer.schemas import TRIALS\n"
        "trials = TRIALS.read(sys.argv[1])\n"
        "for make in (SliceFigure, ParallelFigure, ImportanceFigure): make(trials).png()\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "trials.csv"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


def test_importance_is_that_of_what_matters(searched):
    axes = ImportanceFigure(searched).draw().axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    widths = [bar.get_width() for bar in axes.patches]
    assert names[int(np.argmax(widths))] == "lr"
    assert widths == sorted(widths, reverse=True)
    assert axes.yaxis_inverted()  # the most important one is at the top
    assert sum(widths) == pytest.approx(1.0)


def test_the_rebuilt_study_is_the_one_of_the_frame(searched):
    values = searched["value"].where((searched["state"] == "COMPLETE") & ~searched["diverged"])
    trials = study_of(searched, values).trials
    assert [trial.number for trial in trials] == list(searched["number"])
    for trial, row in zip(trials, searched.to_dict("records"), strict=True):
        assert trial.params["lr"] == row["lr"]
        assert trial.params["schedule"] == row["schedule"]
    assert {trial.value for trial in trials if trial.value is not None} == set(values.dropna())


def test_the_space_is_read_off_the_values(searched):
    space = search_space(searched)
    assert {name: getattr(found, "log", None) for name, found in space.items()} == {
        "beta1": False, "init_scale": True, "lr": True, "schedule": None, "weight_decay": True,
    }  # fmt: skip


def test_values_of_every_kind_can_be_searched(searched, tmp_path):
    kinds = searched.assign(
        flag=searched["number"] % 2 == 0,
        size=searched["number"] % 3 * 16,
        mixed=[["none", 0.1, 2][n % 3] for n in searched["number"]],
        seldom=searched["lr"].where(searched["number"] % 5 == 0),
        same=1.0,
    )
    read = TRIALS.read(TRIALS.write(kinds, tmp_path / "trials.csv"))
    for make in ALL:
        assert make(read).svg("a") == make(kinds).svg("a")
    assert "same" not in search_space(kinds)
    assert search_space(kinds)["mixed"].choices == ("0.1", "2", "none")


@pytest.mark.parametrize("name", extended_but(["$x_{", "<script>", "日本", "a" * 300], "$x_{"))
def test_any_name_and_value_can_be_drawn(searched, name):
    renamed = searched.rename(columns={"init_scale": name}).assign(
        schedule=searched["schedule"].replace("wsd", name), beta1=0.9
    )
    for make in ALL:
        assert "<script" not in make(renamed).svg("a")


def test_too_little_is_refused_with_the_next_move(searched):
    for make in ALL:
        with pytest.raises(RequestError, match="run `mutransfer tune"):
            make(searched.head(1))
        with pytest.raises(RequestError, match="run `mutransfer tune"):
            make(searched[list(TRIALS.columns)])
    with pytest.raises(RequestError, match="at least 20"):
        ImportanceFigure(searched.head(19))
    with pytest.raises(RequestError, match="at least two"):
        ParallelFigure(searched[[*TRIALS.columns, "lr"]])


def test_trials_that_all_end_alike(searched):
    alike = searched.assign(value=1.5, diverged=False, state="COMPLETE")
    for make in (SliceFigure, ParallelFigure):
        make(alike).png()
    with pytest.raises(RequestError, match="1 different losses"):
        ImportanceFigure(alike)
