"""The documentation builds, its links hold, and every code block on it runs as it stands."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import mutransfer as mt
from mutransfer.cli import run
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import TRIALS
from mutransfer.sweeps.experiment import PLACEHOLDERS, Budget, Experiment, Range, Repeats, Size, Trainer

from .helpers.documents import COMMANDS, ROOT, PageRun, blocks, every_page, inline_commands
from .helpers.services import missing_service
from .helpers.sets import extended_but

LANGUAGES = {"python", "sh", "yaml", "json", "text", "ini"}
PAGES = [page for page in every_page() if blocks(page)]
SLOW = [page for page in PAGES if any("slow" in block.directives for block in blocks(page))]

# What a page takes for granted and does not say in hidden blocks: the README is read as plain text as well.
SETUP = {
    "README.md": """
import mutransfer as mt
import torch
from pathlib import Path
from torch import nn
from torch.nn import functional as F

class GPT(nn.Module):
    def __init__(self, n_embd, n_layer):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(16, n_embd), nn.Linear(n_embd, n_embd)
        self.norms = nn.ModuleList(nn.LayerNorm(n_embd) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, 16)

    def forward(self, x):
        h = F.gelu(self.mix(self.embedding(x)))
        for norm in self.norms:
            h = norm(h)
        return self.head(h)

tokens, targets = torch.randint(16, (2, 2, 8))
base = mt.Scale(width=256, depth=4)
family = mt.Family(
    build=lambda scale: GPT(scale.width, scale.depth), batch=(tokens, targets), base=base,
    loss=lambda model, batch: F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()),
)
model = GPT(4096, 4)
Path("runs/proxy").mkdir(parents=True)
mt.Recipe(lr=2**-7).save("runs/proxy/best.json")
Path("config.json").write_text(
    '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,'
    '"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 128}'
)
""",
}


@pytest.fixture
def _own_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Modules that a page imports from its folder are gone afterwards, for another page has others of the same name."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run_page(page: str, folder: Path, capture: Any, *, slow: bool) -> PageRun:
    done = PageRun(page, folder, slow=slow)
    exec(SETUP.get(page, ""), done.names)
    done.run(capture)
    if page in AFTERWARDS:
        AFTERWARDS[page](done)
    return done


@pytest.mark.usefixtures("_own_modules")
@pytest.mark.parametrize("page", extended_but(PAGES, "docs/how-to/own-training-loop.md"))
def test_every_block_of_a_page_runs(page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_page(page, tmp_path, capsys, slow=False)
    print(*done.left_out, sep="\n")


@pytest.mark.slow
@pytest.mark.usefixtures("_own_modules")
@pytest.mark.parametrize("page", SLOW)
def test_every_block_of_a_page_runs_with_the_slow_ones(
    page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page(page, tmp_path, capsys, slow=True)


def test_no_block_is_left_out_without_a_reason() -> None:
    found = {page: blocks(page) for page in every_page()}
    for page, of_page in found.items():
        fences = re.findall(r"^ *(?:```|~~~)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert 2 * sum(not block.hidden for block in of_page) == len(fences), page
    shown = [block for of_page in found.values() for block in of_page if not block.hidden]
    assert {block.language for block in shown} <= LANGUAGES
    reasons = {
        block.where: f"{kind}: {block.directives[kind]}"
        for block in shown
        for kind in ("not run", "slow", "not an experiment")
        if kind in block.directives
    }
    print(f"{len(shown)} blocks, {len(reasons)} of them not run here:")
    print(*(f"{where}: {reason}" for where, reason in reasons.items()), sep="\n")
    assert all(len(reason.split(": ", 1)[1].split()) >= 3 for reason in reasons.values())
    assert len(reasons) < len(shown) / 2


def test_commands_in_running_text_have_their_options() -> None:
    for page in [*every_page(), "CONTRIBUTING.md"]:
        for name, options in inline_commands(page):
            assert name in COMMANDS, (page, name)
            known = {each for parameter in COMMANDS[name].params for each in parameter.opts}
            assert {*options} <= known, (page, name)


# What a page's blocks leave behind is as the page says.


def _python_page(done: PageRun) -> None:
    names = done.names
    out = "".join(done.outputs)
    assert str(names["plan"]) in out
    assert "law sqrt" in out
    assert "as planned" in out
    text = (ROOT / done.page).read_text(encoding="utf-8")
    columns = re.search(r"frame\(\)  # (.*?) and their factors", text)
    assert columns
    assert columns[1].split(", ") == list(names["frame"].columns)[: columns[1].count(",") + 1]
    family, plan = names["family"], names["plan"]
    assert names["loss"].item() < family.loss(names["build"](plan.scale), family.batch).item()


def _readme(done: PageRun) -> None:
    assert "width 64 → 1024" in "".join(done.outputs)


def _learned(run: Path, trials: int) -> None:
    frame = TRIALS.read(RunFolder(run).trials)
    assert frame["state"].isin(["COMPLETE", "PRUNED"]).sum() == trials
    assert frame["value"].min() < 4.5 < 5.5  # a guess costs log 256 = 5.5
    assert frame["value"].nunique() == len(frame)


def _user_trainer(done: PageRun) -> None:
    _learned(done.folder / "runs/function", 6)
    if done.slow:
        _learned(done.folder / "runs/parallel", 6)
    _learned(done.folder / "runs/command", 4)
    assert (done.folder / "runs/command/big/model.pt").is_file()
    finished = TRIALS.read(done.folder / "runs/command/trials.csv")
    first = done.folder / "runs/command/trials" / str(finished.loc[finished["state"] == "COMPLETE", "number"].iloc[0])
    assert (first / "stdout.log").read_text().startswith("training ")
    assert (first / "out/model.pt").is_file()


AFTERWARDS: dict[str, Callable[[PageRun], None]] = {
    "README.md": _readme,
    "docs/how-to/own-training-loop.md": _python_page,
    "docs/how-to/user-trainer.md": _user_trainer,
}


@pytest.mark.extended
def test_the_github_action_runs_the_check_and_keeps_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [each for each in blocks("docs/how-to/coordinate-check.md") if each.language == "yaml"]
    steps = yaml.safe_load(block.text)["jobs"]["check"]["steps"]
    (command,) = [step["run"] for step in steps if step.get("run", "").startswith("mutransfer ")]
    (kept,) = [step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")]
    source = (ROOT / "tests/helpers/mup_models.py").read_text(encoding="utf-8")
    (tmp_path / "my_model.py").write_text(source + "\nfamily = plain_mlp\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(command.split()[1:]) == 0, capsys.readouterr().out
    assert "control sp: fail" in capsys.readouterr().out
    assert (tmp_path / kept).is_file()


# The reference pages have every key of what they describe, with its default.


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The cells of the first table below a heading, by the key in the first one."""
    text = f"\n{(ROOT / page).read_text(encoding='utf-8')}".split(f"\n{heading}\n", 1)[1]
    table = re.search(r"^\| key .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, heading
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[1].splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("## Keys", Experiment), ("## proxy and base", Size), ("## trainer", Trainer), ("## search", Range),
        ("## budget", Budget), ("## repeats", Repeats),
    ],
)  # fmt: skip
def test_the_experiments_reference_has_every_key_and_default(heading: str, model: Any) -> None:
    documented = rows("docs/reference/experiment.md", heading)
    assert list(documented) == list(model.model_fields)
    for key, (_, default, meaning) in documented.items():
        field = model.model_fields[key]
        assert meaning, key
        if field.is_required():
            assert default == "required", key
            continue
        expected = field.get_default(call_default_factory=True)
        given = yaml.safe_load(default.strip("`"))
        if key == "search":
            given, expected = {"lr": Range(**given["lr"])}, {"lr": Range(low=2**-12, high=2**-3, log=True)}
        elif key in ("proxy", "budget", "recipe") and expected is not None:
            given = type(expected)(**given)
        assert given == expected, key


def test_the_recipes_reference_has_every_key_and_default() -> None:
    documented = rows("docs/reference/recipe.md", "# Recipe")
    defaults = {**mt.Recipe().model_dump(mode="json"), "method": str(mt.Recipe().method)}  # left out of files
    assert list(documented) == list(defaults)
    assert {key: yaml.safe_load(default.strip("`")) for key, (default, _) in documented.items()} == defaults


def test_the_trainers_page_names_every_key_and_placeholder() -> None:
    page = (ROOT / "docs/how-to/user-trainer.md").read_text(encoding="utf-8")
    assert {key for key in Trainer.model_fields if key != "call" and key not in page} == set()
    assert {name for name in PLACEHOLDERS if f"`{{{name}}}`" not in page} == set()


def test_the_run_folders_reference_names_every_file() -> None:
    page = (ROOT / "docs/reference/run-folder.md").read_text(encoding="utf-8")
    files = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    folder = RunFolder(Path())
    assert {str(getattr(folder, name)) for name in files if f"`{getattr(folder, name)}`" not in page} == set()


def test_the_api_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/reference/api/mutransfer.md").read_text(encoding="utf-8")
    found = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    assert set(mt.__all__) <= found  # that each has a home with a docstring, the strict build says


# Links and the site.


def test_files_that_code_and_pages_name_exist() -> None:
    """Messages and comments name pages of the documentation, and pages name files of the source."""
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    sources = [name for name in kept if name.endswith((".py", ".yaml", ".md")) or name.startswith(".ci/")]
    assert sources or not (ROOT / ".git").exists()
    missing = []
    for name in sources:
        text = (ROOT / name).read_text(encoding="utf-8")
        missing += [
            (name, path)
            for path in re.findall(r"\bdocs/[\w/-]+\.(?:md|png|csv|py)", text)
            if not (ROOT / path).exists()
        ]
        if name.endswith(".md"):
            paths = re.findall(r"`((?:tests|benchmarks|mutransfer)/[\w/]+\.py)[`:]", text)
            missing += [(name, path) for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_the_readmes_links_lead_to_files() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert link.startswith("https://") or (ROOT / link).exists(), (page, link)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a page outside of the navigation, a broken link or anchor, or a name without docstring fails."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            missing_service(
                f"{package} is not installed: pip install -c constraints.txt -e '.[docs]' to build the site"
            )
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)], cwd=ROOT,
        capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.extended
def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        loads = re.findall(r"""(?:\bsrc=|<link[^>]*\bhref=|@import\s+|\burl\()["']?((?:https?:)?//[^"')\s>]+)""", text)
        assert loads == [], path


def test_the_site_has_every_command_option_and_column(site: Path) -> None:
    from mutransfer import schemas

    commands = (site / "reference/cli/index.html").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert f'id="{name}"' in commands
        for parameter in command.params:
            assert all(f"<code>{each}</code>" in commands for each in parameter.opts if each.startswith("--")), name
    folder = (site / "reference/run-folder/index.html").read_text(encoding="utf-8")
    for schema in (
        schemas.TRIALS,
        schemas.REPEATS,
        schemas.COORDINATES,
        schemas.BASINS,
        schemas.SLOPES,
        schemas.OPTIMA,
    ):
        assert all(f"<code>{column}</code>" in folder for column in schema.columns), schema.name
