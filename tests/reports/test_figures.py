"""Every figure hands out its frame, redraws from CSV, and leaves no run out."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mutransfer.errors import RequestError
from mutransfer.reports import BasinFigure, CoordinateFigure, HistoryFigure, WiderFigure
from mutransfer.schemas import BASINS, COORDINATES, OPTIMA, SLOPES, TRIALS

from ..helpers.sets import extended_but
from .conftest import coordinate_frame, slope_frame


def lines(figure: Figure, gid: str) -> list:
    return [line for axes in figure.axes for line in axes.lines if line.get_gid() == gid]


def points(figure: Figure, gid: str) -> int:
    return sum(len(line.get_xdata()) for line in lines(figure, gid))


def words(figure: Figure) -> str:
    titles = (axes.get_title(loc=where) for axes in figure.axes for where in ("center", "left"))
    return "\n".join([*(text.get_text() for axes in figure.axes for text in axes.texts), *titles])


def test_frames_come_out_as_they_went_in(basins, optima, coordinates, slopes, trials):
    pd.testing.assert_frame_equal(BasinFigure(basins, optima).frame(), basins)
    pd.testing.assert_frame_equal(CoordinateFigure(coordinates, slopes).frame(), coordinates)
    pd.testing.assert_frame_equal(HistoryFigure(trials).frame(), trials)


def test_changing_a_frame_does_not_change_the_figure(basins, optima):
    figure = BasinFigure(basins, optima)
    frame = figure.frame()
    frame["loss"] = 0.0
    pd.testing.assert_frame_equal(figure.frame(), basins)


@pytest.mark.extended
def test_csv_redraws_every_figure(tmp_path, basins, optima, coordinates, slopes, trials):
    def again(schema, frame):
        return schema.read(schema.write(frame, tmp_path / f"{schema.name}.csv"))

    pairs = [
        (BasinFigure(basins, optima), BasinFigure(again(BASINS, basins), again(OPTIMA, optima))),
        (WiderFigure(basins, optima), WiderFigure(again(BASINS, basins), again(OPTIMA, optima))),
        (
            CoordinateFigure(coordinates, slopes),
            CoordinateFigure(again(COORDINATES, coordinates), again(SLOPES, slopes)),
        ),
        (HistoryFigure(trials), HistoryFigure(again(TRIALS, trials))),
    ]
    for figure, redrawn in pairs:
        assert figure.svg("a") == redrawn.svg("a"), type(figure).__name__


def test_no_global_state(basins, optima, tmp_path):
    before = dict(matplotlib.rcParams)
    path = BasinFigure(basins, optima).save(tmp_path / "plots" / "basins.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs


def test_the_users_own_settings_do_not_change_a_figure(basins, optima):
    plain = BasinFigure(basins, optima).svg("a")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "svg.fonttype": "none"}):
        assert BasinFigure(basins, optima).svg("a") == plain


def test_every_diverged_run_is_a_cross(basins, optima):
    assert points(BasinFigure(basins, optima).draw(), "diverged") == basins["diverged"].sum() > 0


def test_a_basin_line_per_width_and_parametrization(basins, optima):
    drawn = BasinFigure(basins, optima).draw()
    for width in (64, 256, 1024):
        for line, name in zip(lines(drawn, f"width {width}"), ("sp", "mup"), strict=True):
            runs = basins[(basins["width"] == width) & (basins["parametrization"] == name)].dropna(subset="loss")
            np.testing.assert_allclose(line.get_ydata(), runs.groupby("log2_lr")["loss"].mean())


def test_drift_is_written_with_its_interval(basins, optima):
    text = words(BasinFigure(basins, optima).draw())
    assert "−1.94 [−2.15, −1.85]" in text or "−1.94 [−2.15, −1.79]" in text
    assert "best lr drifts −1.9" in text
    assert "width 64 → 1024" in text


def test_basins_where_everything_diverged(basins, optima):
    basins = basins.assign(loss=np.nan, diverged=True)
    drawn = BasinFigure(basins, optima.iloc[:0]).draw()
    assert points(drawn, "diverged") == len(basins)
    assert "no optimum" in words(drawn)


def test_wider_shows_a_diverged_transfer(basins, optima):
    lost = (optima["parametrization"] == "sp") & (optima["width"] == 1024)
    optima.loc[lost, ["transferred_loss", "regret", "regret_low", "regret_high"]] = np.inf
    figure = WiderFigure(basins, optima)
    assert points(figure.draw(), "lost") == 1
    figure.png()
    optima.loc[lost, ["transferred_loss", "regret", "regret_low", "regret_high"]] = np.nan  # no run at that rate
    assert points(WiderFigure(basins, optima).draw(), "lost") == 0


def test_a_point_of_fewer_seeds_is_hollow(basins, optima):
    assert points(BasinFigure(basins, optima).draw(), "fewer seeds") > 0  # runs that diverged
    whole = basins[
        ~basins["diverged"].groupby([basins[c] for c in ("parametrization", "width", "log2_lr")]).transform("any")
    ]
    assert points(BasinFigure(whole, optima).draw(), "fewer seeds") == 0
    assert "Hollow" not in BasinFigure(whole, optima).caption
    key = (whole["parametrization"] == "mup") & (whole["width"] == 256) & (whole["log2_lr"] == -7)
    short = BasinFigure(whole[~(key & (whole["seed"] > 2))], optima)
    assert points(short.draw(), "fewer seeds") == 1
    assert "fewer than 5 losses" in short.caption
    alone = BasinFigure(whole[whole["seed"] < 2], optima.iloc[:0], seeds=5)
    assert points(alone.draw(), "fewer seeds") == len(whole[["parametrization", "width", "log2_lr"]].drop_duplicates())
    assert points(alone.draw(), "diverged") == 0
    assert "optimum" not in alone.caption.replace("No optimum is marked", "")


def test_wider_frame_has_both_rates(basins, optima):
    frame = WiderFigure(basins, optima).frame()
    assert frame.groupby(["parametrization", "width"])["rate"].apply(set).eq({"transferred", "own best"}).all()
    carried = frame[frame["rate"] == "transferred"]["loss"].to_numpy()
    np.testing.assert_array_equal(carried, optima.sort_values(["parametrization", "width"])["transferred_loss"])
    own = frame[frame["rate"] == "own best"]
    assert ((own["low"] <= own["loss"] * 1.02) & (own["loss"] <= own["high"] * 1.02)).all()


def test_failing_module_is_shown_and_marked(broken):
    coordinates, slopes = broken
    figure = CoordinateFigure(coordinates, slopes)
    assert "h.ffn" in figure.groups
    assert len(figure.groups) == 12
    assert "8 more" in figure.caption
    text = words(figure.draw())
    assert text.count("✗") == (~slopes["ok"]).sum() == 3
    assert "✓" in text


def test_control_is_drawn_in_every_panel(coordinates, slopes):
    drawn = CoordinateFigure(coordinates, slopes).draw()
    panels = len(coordinates[["module", "statistic", "step"]].drop_duplicates())
    assert len(lines(drawn, "sp")) == len(lines(drawn, "mup")) == panels


def test_coordinates_that_are_zero_missing_or_not_told(coordinates, slopes):
    embed = coordinates["module"] == "embed"
    coordinates.loc[embed & (coordinates["step"] == 0), "value"] = 0.0
    coordinates.loc[embed & (coordinates["step"] == 1) & (coordinates["width"] == 512), "value"] = np.nan
    slopes.loc[slopes["module"] == "embed", "ok"] = pd.NA
    figure = CoordinateFigure(coordinates, slopes)
    drawn = figure.draw()
    assert "exactly 0" in words(drawn)
    assert words(drawn).count("?") == 4
    assert points(drawn, "lost") == 2 * 5
    figure.png()


def test_every_finished_trial_is_drawn_once(trials):
    drawn = HistoryFigure(trials).draw()
    assert points(drawn, "finished") + points(drawn, "pruned") + points(drawn, "lost") == len(trials) - 1
    assert points(drawn, "lost") == trials["diverged"].sum() > 0
    assert "1 not finished" in HistoryFigure(trials).caption
    (best,) = lines(drawn, "best")
    assert best.get_ydata()[-1] == trials.loc[trials["state"] == "COMPLETE", "value"].min()


def test_history_against_compute_or_else_trial_number(trials):
    assert "floating point operations" in HistoryFigure(trials).draw().axes[0].get_xlabel()
    interrupted = trials.assign(state=trials["state"].where(trials["number"] != 9, "FAIL"))
    interrupted.loc[interrupted["number"] == 9, ["value", "flops"]] = np.nan
    assert "floating point operations" in HistoryFigure(interrupted).draw().axes[0].get_xlabel()
    assert HistoryFigure(trials.assign(flops=np.nan)).draw().axes[0].get_xlabel() == "trial"


@pytest.mark.parametrize("name", extended_but(["$x_{", "<script>", "日本", "a\x00b", "a" * 300], "$x_{"))
def test_any_name_can_be_drawn(coordinates, slopes, basins, optima, name):
    coordinates["module"] = coordinates["module"].replace("embed", name)
    slopes["module"] = slopes["module"].replace("embed", name)
    assert "<script" not in CoordinateFigure(coordinates, slopes).svg("a")
    basins["parametrization"] = basins["parametrization"].replace("mup", name)
    optima["parametrization"] = optima["parametrization"].replace("mup", name)
    BasinFigure(basins, optima).svg("a")
    WiderFigure(basins, optima).svg("a")


def test_svg_ids_carry_the_prefix_and_resolve(basins, optima, trials):
    for figure in (BasinFigure(basins, optima), HistoryFigure(trials)):
        svg = figure.svg("p")
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert len(ids) == len(set(ids))
        assert all(name.startswith("p-") for name in ids)
        references = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
        assert references
        assert set(references) == set(ids)
        assert not re.search(r"<style|<script|<metadata|<!--|https?://(?!www\.w3\.org/2000/svg\")", svg)


def test_nothing_to_draw_is_said(basins, optima, coordinates, slopes, trials):
    for make in (
        lambda: BasinFigure(basins.iloc[:0], optima),
        lambda: WiderFigure(basins, optima.iloc[:0]),
        lambda: CoordinateFigure(coordinates.iloc[:0], slopes),
        lambda: CoordinateFigure(coordinates, slopes.iloc[:0]),
        lambda: HistoryFigure(trials[trials["state"] == "RUNNING"]),
    ):
        with pytest.raises(RequestError, match="run `mutransfer"):
            make()
    with pytest.raises(RequestError, match="missing loss"):
        BasinFigure(basins.drop(columns="loss"), optima)


def test_package_data_is_beside_the_modules():
    import mutransfer.reports

    home = Path(mutransfer.reports.__file__).parent
    assert {"mutransfer.mplstyle", "report.html", "report.css", "report.js"} <= {path.name for path in home.iterdir()}


def test_a_range_without_a_lower_end_is_not_furthest_from_it(broken):
    coordinates, slopes = broken
    calm = slopes["module"] == "t.ffn"
    slopes.loc[calm, ["slope", "expected"]] = [-0.3, "-inf..0"]
    figure = CoordinateFigure(coordinates, slopes)
    assert "t.ffn" not in figure.groups
    assert "h.ffn" in figure.groups


def test_a_module_without_a_slope_that_fails_is_shown(broken):
    coordinates, slopes = broken
    slopes.loc[slopes["module"] == "t.ffn", ["slope", "low", "high", "ok"]] = [np.nan, np.nan, np.nan, False]
    assert "t.ffn" in CoordinateFigure(coordinates, slopes).groups


def test_blocks_are_one_row_that_shows_the_worst_of_them():
    coordinates = coordinate_frame({f"blocks.{i}.ffn": (0.0, 1.0) for i in range(20)}, broken="blocks.7.ffn")
    figure = CoordinateFigure(coordinates, slope_frame(coordinates))
    assert list(figure.groups) == ["blocks.*.ffn"]
    assert {module for (_, statistic, _), module in figure.panels.items() if statistic == "change"} == {"blocks.7.ffn"}
    assert words(figure.draw()).count("✗") == 3
    assert "blocks.7.ffn" in words(figure.draw())
    assert "more modules" not in figure.caption


def test_a_failing_statistic_of_a_weight_gets_a_column_in_its_modules_row(coordinates, slopes):
    here = coordinates[(coordinates["module"] == "embed") & (coordinates["step"] == 0)]
    row = slopes[(slopes["module"] == "embed") & (slopes["step"] == 0)]
    for name in ("decay", "weight"):
        coordinates = pd.concat([coordinates, here.assign(module="embed.weight", statistic=name)])
        slopes = pd.concat([slopes, row.assign(module="embed.weight", statistic=name, ok=name == "decay")])
    figure = CoordinateFigure(coordinates.reset_index(drop=True), slopes.reset_index(drop=True))
    assert ("weight", 0) in figure.columns
    assert ("decay", 0) not in figure.columns  # it holds: the table has it
    assert figure.groups["embed"] == {"embed", "embed.weight"}
    assert figure.panels["embed", "weight", 0] == "embed.weight"
    assert words(figure.draw()).count("✗") == 1
    assert "weight size at initialization" in words(figure.draw())
