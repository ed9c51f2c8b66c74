"""The report in a real Chromium, from file:// with the network off: what it asks for, shows, sorts and hands out."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from mutransfer.reports import BasinFigure, HistoryFigure, PlanFigure, SliceFigure, write_report
from mutransfer.schemas import BASINS, COORDINATES, PARAMETERS, TRIALS

from ..helpers.services import program
from .conftest import HOSTILE, coordinate_frame, made_optima, made_search, run_folder, stand_in

pytestmark = pytest.mark.integration

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
FIGURES = 8
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = program(["chromium", "chromium-browser", "google-chrome"], "chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 500 trials and so many modules that its coordinates are compressed."""
    folder = run_folder(tmp_path_factory.mktemp("large"))
    TRIALS.write(made_search(500), folder / "trials.csv")
    many = {HOSTILE: (0.0, 1.0)} | {f"blocks.{i}.ffn": (0.0, 1.0) for i in range(30)}
    COORDINATES.write(coordinate_frame(many), folder / "coordinates.csv")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        return write_report(folder)


class Seen:
    """A page with everything that it said and asked for."""

    def __init__(self, browser: Browser, report: Path, **options: Any) -> None:
        self.context = browser.new_context(offline=True, **({"viewport": DESK} | options))
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())


@pytest.fixture
def opened(browser: Browser, large: Path) -> Iterator[Seen]:
    seen = Seen(browser, large)
    yield seen
    seen.context.close()
    assert seen.said == []


def column(page: Page, table: str, index: int) -> list[str]:
    return page.locator(f'[aria-label="{table}"] tbody tr:visible td:nth-child({index})').all_inner_texts()


def test_it_asks_for_nothing_and_says_nothing(opened: Seen, large: Path):
    assert opened.requests == [large.as_uri()]
    opened.page.get_by_role("button", name="module").click()
    opened.page.get_by_label("Find").first.fill("ffn")
    opened.page.wait_for_timeout(300)
    assert opened.requests == [large.as_uri()]
    assert opened.said == []
    assert large.stat().st_size < 3_000_000


@pytest.mark.parametrize("size", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_visible_and_nothing_leaves_the_page(browser: Browser, large: Path, size, scheme):
    seen = Seen(browser, large, viewport=size, color_scheme=scheme)
    figures = seen.page.locator("figure svg")
    assert figures.count() == FIGURES
    for index in range(FIGURES):
        box = figures.nth(index).bounding_box()
        assert box["width"] > 280
        assert box["height"] > 50
        assert figures.nth(index).locator("path, use").count() > 10
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    shades = seen.page.evaluate(
        "[document.body, document.querySelector('.paper')].map(e => getComputedStyle(e).backgroundColor)"
    )
    dark = sum(map(int, shades[0].removeprefix("rgb(").removesuffix(")").split(","))) < 200
    assert dark == (scheme == "dark")
    assert shades[1] == "rgb(255, 255, 255)"  # figures keep their paper
    seen.context.close()
    assert seen.said == []


def test_tables_sort_by_number_and_by_name(opened: Seen):
    page = opened.page
    heading = page.locator('[aria-label="Optimal learning rate per parametrization and width"] th', has_text="width")
    heading.get_by_role("button").click()
    table = "Optimal learning rate per parametrization and width"
    assert column(page, table, 2) == ["64", "64", "256", "256", "1024", "1024"]  # as words 1024 would come first
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.get_by_role("button").click()
    assert column(page, table, 2) == ["1024", "1024", "256", "256", "64", "64"]
    drift = page.locator(f'[aria-label="{table}"] th', has_text="drift")
    drift.get_by_role("button").click()
    assert [cell[:5] for cell in column(page, table, 4)] == ["−1.94", "−0.97", "refer", "refer", "+0.03", "+0.06"]
    names = page.locator('[aria-label="Settings per parameter"] th', has_text="name")
    names.get_by_role("button").click()
    assert column(page, "Settings per parameter", 1) == ["</table>", HOSTILE, "w"]
    missing = page.locator('[aria-label="Settings per parameter"] th', has_text="eps").first
    for _ in range(2):  # a missing value is last, whichever way
        missing.get_by_role("button").click()
        assert column(page, "Settings per parameter", 1)[-1] == "w"


def test_tables_are_searched(opened: Seen):
    slopes = opened.page.locator(".searched").first
    slopes.get_by_label("Find").fill("BLOCKS.7.")
    shown = column(opened.page, "Slopes of the coordinate check", 1)
    assert set(shown) == {"blocks.7.ffn"}
    assert slopes.locator(".count").inner_text().startswith(f"{len(shown)} of ")


def test_a_hostile_name_is_text(opened: Seen):
    assert opened.page.locator("script").count() == 1
    assert column(opened.page, "Settings per parameter", 1)[1] == HOSTILE
    assert opened.page.get_by_text(HOSTILE).count() >= 3


def test_downloads_give_the_frames_back_exactly(opened: Seen, large: Path, tmp_path: Path):
    read = {}
    for schema in (TRIALS, BASINS, COORDINATES, PARAMETERS):
        with opened.page.expect_download() as waiting:
            opened.page.locator(f'a[download^="{schema.name}.csv"]').click()
        path = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(path)
        if path.suffix == ".gz":
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        read[schema.name] = schema.read(tmp_path / f"{schema.name}.csv")
        on_disk = schema.read(large.parent / f"{schema.name}.csv")
        pd.testing.assert_frame_equal(read[schema.name], on_disk, check_exact=True)
    assert (tmp_path / "coordinates.csv.gz").exists()
    pd.testing.assert_frame_equal(read["trials"], made_search(500), check_exact=True)
    # What came out of the page draws the same pictures, without the run.
    source = large.read_text(encoding="utf-8")
    drawn = {"basins": BasinFigure(read["basins"], made_optima()), "planned": PlanFigure(read["parameters"])}
    drawn |= {"history": HistoryFigure(read["trials"]), "slices": SliceFigure(read["trials"])}
    for name, figure in drawn.items():
        assert figure.svg(name) in source, name


def test_it_prints_whole(opened: Seen):
    page = opened.page
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    assert not page.locator(".downloads").is_visible()
    assert not page.locator(".search").first.is_visible()
    cut = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => getComputedStyle(e).overflowY !== 'visible').length"
    )
    assert cut == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_it_can_be_read_without_scripts(browser: Browser, large: Path):
    seen = Seen(browser, large, java_script_enabled=False)
    assert seen.page.locator("figure svg").count() == FIGURES
    assert seen.page.get_by_text("Learning-rate transfer: pass.").is_visible()
    assert not seen.page.get_by_label("Find").first.is_visible()
    seen.context.close()
