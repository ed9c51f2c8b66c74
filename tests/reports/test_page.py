"""The report is one file that asks nobody for anything, says what it knows first, and escapes every name."""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import re
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest

from mutransfer.errors import FrameError, RequestError
from mutransfer.io import write_json
from mutransfer.reports import page as page_module
from mutransfer.reports import write_report
from mutransfer.reports.contents import RunContents
from mutransfer.reports.page import download, downloads
from mutransfer.schemas import BASINS, COORDINATES, PARAMETERS, TRIALS

HOSTILE = "<script>alert(1)</script>"
FIGURES = {"basins", "coordinates", "history", "importances", "parallel", "planned", "slices", "wider"}


class Page(HTMLParser):
    """Collects tags with their attributes and the text between them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def attributes(self, *names):
        return [(tag, name, found[name]) for tag, found in self.tags for name in names if name in found]

    def files(self):
        found = {}
        for tag, attributes in self.tags:
            if tag == "a" and "download" in attributes:
                raw = base64.b64decode(attributes["href"].partition(";base64,")[2])
                name = attributes["download"]
                found[name.removesuffix(".gz")] = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()
        return found


@pytest.fixture(scope="module")
def page(report):
    return Page(report)


def without(run, *names):
    """The run without frames whose figures the test does not look at: each takes seconds to draw."""
    for name in names:
        (run / f"{name}.csv").unlink()
    return run


def test_verdict_stands_first(page):
    body = page.text[page.text.index("µTransfer report ·") :]
    order = ["! Warning", "Learning-rate transfer: pass", "Recipe", "Expected loss of one run at width 4096"]
    order += ["Price of tuning", "Price of repeats", "Price of verify", "Not in the price", "mylib::op"]
    order += ["drift of the best lr", "At the widest width", "Learning rate across widths", "Search", "Slopes"]
    order += ["Settings per parameter", "Throughput", "Warnings", "Provenance", "Commands", "Data"]
    places = [body.index(words) for words in order]
    assert places == sorted(places)
    for percent in ("1", "0.2", "300"):
        assert f" {percent} % of one run at the widest width" in page.text.replace("\u00a0", " ")
    assert "lr 0.007812 (2⁻⁷), weight_decay 0.1" in page.text


def test_page_is_self_contained(page):
    for tag, name, value in page.attributes("src", "href", "srcset", "action", "data", "xlink:href"):
        assert value.startswith(("#", "data:")), (tag, name, value[:80])
    assert not re.search(r"url\((?!#)|@import", page.source)
    assert not [tag for tag, _ in page.tags if tag in {"link", "iframe", "object", "embed", "base", "img", "form"}]
    assert len(page.source) < 3_000_000


def test_only_our_script_may_run(page):
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{}]
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    script = page.source.rpartition("<script>")[2].partition("</script>")[0]
    import hashlib

    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_names_are_text(page):
    assert page.source.count("<script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source
    assert not [tag for tag, _ in page.tags if tag == "b"]  # from the folder's name
    assert page.source.count("</table>") == len([tag for tag, _ in page.tags if tag == "table"])


def test_ids_are_unique_over_all_figures(page):
    ids = [value for _, _, value in page.attributes("id")]
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(FIGURES)
    assert len(ids) == len(set(ids)) > len(FIGURES)
    for _, _, value in page.attributes("href"):
        assert not value.startswith("#") or value[1:] in ids


def test_downloads_give_the_frames_back(page, report):
    files = page.files()
    for schema in (BASINS, COORDINATES, TRIALS):
        assert files[f"{schema.name}.csv"] == (report.parent / f"{schema.name}.csv").read_text()
    parameters = PARAMETERS.frame(pd.read_csv(io.StringIO(files["parameters.csv"])))
    assert list(parameters["name"]) == ["w", HOSTILE, "</table>"]
    assert parameters["eps"].isna().tolist() == [True, False, False]
    assert json.loads(files["best.json"])["lr"] == 2**-7
    assert {"slopes.csv", "optima.csv"} <= set(files)


def test_long_downloads_are_compressed():
    made = download("trials.csv", "1,2,3\n" * 100_000)
    assert made.name == "trials.csv.gz"
    assert len(made.uri) < 10_000
    assert gzip.decompress(base64.b64decode(made.uri.partition(";base64,")[2])) == b"1,2,3\n" * 100_000


def test_what_does_not_fit_into_the_page_is_left_in_the_folder(run, core, monkeypatch):
    made = downloads({"large.csv": "x" * 1000, "small.csv": "x"}, budget=500)
    assert [bool(file.uri) for file in made] == [False, True]
    monkeypatch.setattr(page_module, "downloads", functools.partial(downloads, budget=500))
    page = Page(write_report(without(run, "basins", "trials")))
    assert "coordinates.csv (too large for this page: in the run folder)" in page.text
    assert "coordinates.csv" not in page.files()


def test_comparison_says_what_diverged(page):
    row = page.text[page.text.index("SP at the transferred lr") :][:60]
    assert "diverged" in row
    assert "+25.0 %" in page.text


def test_comparison_says_what_was_compared_and_the_paired_difference(page):
    row = page.text[page.text.index("SP, tuned at width 1024 over lr and alpha_output") :][:140]
    assert "+0.0120 [+0.0080, +0.0160] +5.0 %" in row
    assert f"SP is 0.0120 higher, paired {HOSTILE}." in page.text


def test_plots_are_written(report):
    assert {path.name for path in (report.parent / "plots").iterdir()} == {f"{name}.png" for name in FIGURES}


@pytest.mark.extended
def test_same_frames_same_bytes(report, run, core):
    assert write_report(run).read_text().replace(str(run), "") == report.read_text().replace(str(report.parent), "")


def test_the_core_is_asked_about_the_checked_parametrization_and_the_transferred_lr(run, core):
    write_report(without(run, "trials"))
    assert set(core["coordinates"]["parametrization"]) == {"mup"}
    assert core["transferred"] == -7.0


def test_failing_verdict_leads_with_its_cause(run, core):
    cause = "hidden lr not divided by the width: change of `blocks.*.ffn.up` grows as width^0.98"
    write_json(run / "check.json", {"verdict": "fail", "cause": cause, "parametrization": "mup", "control": None})
    page = Page(write_report(without(run, "trials")))
    assert "✗ Fail" in page.text  # although the target has warnings as well
    assert "hidden lr not divided by the width" in page.text
    assert "Learning-rate transfer: pass." in page.text


def test_reasons_of_verify_are_given(run, core):
    write_json(
        run / "verify.json", {"verdict": "undecided", "reasons": ["two seeds only.", "the interval is an octave."]}
    )
    text = Page(write_report(without(run, "coordinates", "trials"))).text
    assert "! Warning" in text
    assert "? Learning-rate transfer: undecided." in text
    assert "two seeds only. the interval is an octave." in text


def test_trials_alone(tmp_path, trials):
    TRIALS.write(trials, tmp_path / "trials.csv")
    page = Page(write_report(tmp_path))
    assert "No verdict yet" in page.text
    assert "best proxy loss of one run" in page.text
    for command in ("mutransfer verify", "mutransfer check MODEL --out", "mutransfer transfer"):
        assert command in page.text
    assert "No learning-rate basins yet: run mutransfer verify" in page.text.replace(" mutransfer", " mutransfer")
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 2  # history and slices: one hyperparameter varies
    assert "Not drawn: only one hyperparameter took more than one value" in page.text


@pytest.mark.parametrize(
    "keep", ["basins.csv", "coordinates.csv", "best.json", "target.json", "environment.json", "verify.json"]
)
def test_any_one_file_is_enough(run, core, keep):
    for path in run.iterdir():
        if path.name != keep:
            path.unlink()
    assert "µTransfer report" in Page(write_report(run)).text


def test_what_the_core_refuses_is_a_sentence_on_the_page(run, core, monkeypatch):
    def refuse(coordinates):
        raise FrameError("one width is no slope: add `--widths`.")

    monkeypatch.setattr(sys.modules["mutransfer.coord_check"], "verdict", refuse)
    assert "one width is no slope" in Page(write_report(without(run, "basins", "trials"))).text


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"holds nothing to report.*mutransfer demo"):
        write_report(tmp_path)
    with pytest.raises(RequestError, match="there is no folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["[]", "{", '"pass"'])
def test_broken_json_is_named(run, core, content):
    (run / "verify.json").write_text(content)
    with pytest.raises(RequestError, match=r"verify\.json"):
        write_report(run)


@pytest.mark.extended
def test_large_run_stays_small(run, core, many_trials):
    TRIALS.write(many_trials(500), run / "trials.csv")
    numbers = dict.fromkeys([c for c, (dtype, _) in PARAMETERS.columns.items() if dtype == "float64"], 1.234567e-5)
    rows = [{"name": f"model.layers.{i}.w", "shape": "4096x4096", "role": "hidden", **numbers} for i in range(3000)]
    write_json(run / "target.json", {"parameters": rows, "warnings": []})
    page = Page(write_report(run))
    assert len(page.source.encode()) < 3_000_000
    assert "1000 more rows are in the CSV" in page.text
    assert page.files()["parameters.csv"].count("\n") == 3001


def test_passing_without_a_warning_is_a_pass(run, core):
    content = json.loads((run / "target.json").read_text())
    write_json(run / "target.json", content | {"warnings": []})
    assert "✓ Pass" in Page(write_report(without(run, "trials"))).text


def test_an_undecided_check_is_a_warning(run, core):
    write_json(run / "check.json", {"verdict": "undecided", "cause": "not enough evidence", "parametrization": "mup"})
    assert "! Warning" in Page(write_report(without(run, "trials"))).text


def test_provenance_has_commands_seeds_and_the_experiment(page):
    text = page.text
    assert f"mutransfer tune '{HOSTILE}' mutransfer verify 'a run & <b>'" in text
    assert f"data: '{HOSTILE}'" in text
    for words in ("seeds.tune 11", "seeds.verify 0, 1, 2, 3, 4", "seeds.target run 3", "data_sha256 2dd84a"):
        assert words in text
    assert {"experiment.yaml", "target.json", "verify.json", "check.json", "environment.json"} <= set(page.files())


def test_throughput_is_that_of_the_frames(page, many_trials):
    trials = many_trials(60)
    ended = trials[trials["state"].isin(["COMPLETE", "PRUNED"])]
    row = page.text[page.text.index("tuning, the proxy") :].split()[3:8]
    seconds = ended["seconds"].sum()
    assert int(row[0]) == len(ended)
    assert float(row[1]) == pytest.approx(seconds / len(ended), rel=1e-3)
    assert float(row[2]) == pytest.approx(60 * len(ended) / seconds, rel=1e-3)
    assert "verify, SP, width 1024 45 1 60 6.29 × 10¹¹ 45" in page.text.replace("\u00a0", " ")


def test_depths_are_called_depths(run, core):
    frame = COORDINATES.read(run / "coordinates.csv")
    COORDINATES.write(frame.assign(depth=frame["width"] // 32, width=64), run / "coordinates.csv")
    assert "Depth check: coordinates across depths" in Page(write_report(without(run, "basins", "trials"))).text


@pytest.mark.extended
def test_what_the_core_computes_can_be_drawn(run):
    page = Page(write_report(run))
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(FIGURES)
    assert "optima.csv" in page.files()


@pytest.mark.parametrize(("text", "said"), [("0..0", "0"), ("-inf..0", "up to 0"), ("-0.5..0", "−0.5 to 0")])
def test_ranges_read_well(slopes, text, said):
    from mutransfer.reports.page import slope_table

    assert slope_table(slopes.assign(expected=text)).rows[0][5] == (said, text)


@pytest.mark.parametrize(
    ("text", "maximize"),
    [
        ("direction: maximize\n", True),
        ('"direction": "maximize"  # accuracy\n', True),
        ("{model: mlp, direction: maximize}\n", True),
        ("direction: minimize\n", False),
        ("trainer:\n  direction: maximize\n", False),
        ("direction: [\n", False),
    ],
)
def test_the_direction_is_read_in_any_style_of_yaml(tmp_path, text, maximize):
    (tmp_path / "experiment.yaml").write_text(text)
    write_json(tmp_path / "best.json", {"lr": 0.1})
    assert RunContents.read(tmp_path).maximize is maximize
