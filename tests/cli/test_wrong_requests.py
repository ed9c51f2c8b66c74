"""Wrong requests: one sentence that names the thing and the next move, exit 2, and nothing half-written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mutransfer.schemas import TRIALS

from ..helpers.processes import Ended, Processes, contents
from ..helpers.sets import extended_but

PROGRESS = re.compile(
    r"(tuning|training|learning-rate basins|coordinate check) .*(…|: \d+/\d+.*)"
    r"|(not decided with|(width \d+: )?trials are trained) .*"
)

# (what is asked, what the sentence names). In the workplace of conftest.py.
TUNE = ("tune", "experiment.yaml", "--out", "new", "--set")
LANGUAGE = ("tune", "language.yaml", "--out", "new", "--set")
WRONG = [
    # An unknown key, with the nearest right one.
    ((*TUNE, "recipe.weigth_decay=0.1"), ["unknown key 'recipe.weigth_decay'", "did you mean 'weight_decay'?"]),
    ((*TUNE, "step=5"), ["unknown key 'step'", "did you mean 'steps'?"]),
    ((*TUNE, "methd=pruned"), ["unknown key 'methd'", "did you mean 'method'?"]),
    ((*TUNE, "search.lr.hihg=5"), ["did you mean 'high'?"]),
    # A value out of range.
    ((*TUNE, "recipe.lr=0"), ["recipe.lr is 0", "greater than 0"]),
    ((*TUNE, "recipe.betas=[0.9, 1.0]"), ["recipe.betas.1 is 1.0", "less than 1"]),
    ((*TUNE, "search.lr.low=5"), ["low 5 is not below high 0.125"]),
    ((*TUNE, "trials=0"), ["trials is 0", "greater than or equal to 1"]),
    (("tune", "experiment.yaml", "--out", "new", "--device", "cpu", "--precision", "tf32"), ["--precision tf32", "GPU"]),
    (("tune", "experiment.yaml", "--trials", "0", "--out", "new"), ["--trials", "greater than or equal to 1"]),
    (("plan", "mlp", "--width", "0"), ["--width", "greater than or equal to 1"]),
    (("check", "mlp", "--widths", "16,x"), ["--widths '16,x'", "'x' is not a positive whole number"]),
    (("check", "mlp", "--widths", "16,²"), ["'²' is not a positive whole number"]),
    (("check", "mlp", "--widths", "16"), ["at least two widths"]),
    (("check", "mlp", "--widths", "16,32", "--lr", "0"), ["--lr: lr is 0", "greater than 0"]),
    (("check", "mlp", "--widths", "16,32", "--lr", "-1"), ["--lr: lr is -1"]),
    (("check", "mlp", "--depths", "2"), ["--depths 2", "at least two depths"]),
    (("check", "mlp", "--depths", "2,x"), ["--depths '2,x'", "'x' is not a positive whole number"]),
    (("check", "mlp", "--depths", "2,4", "--widths", "8,16"), ["--widths 8,16 and --depths 2,4 both vary"]),
    (("check", "mlp", "--depths", "2,4", "--widths", "8", "--parametrization", "completep"), ["no residual branch was found"]),
    (("plan", "mlp", "--width", "16", "--role", "hiden.0.weight=hidden"), ["did you mean 'hidden.0.weight'?"]),
    (("plan", "mlp", "--width", "16", "--role", "hidden.*=hiden"), ["'hiden'", "did you mean 'hidden'?"]),
    (("check", "mlp", "--widths", "8,16", "--role", "hidden"), ["--role 'hidden'", "PATTERN=ROLE"]),
    ((*TUNE, "roles={hidden.*: hiden}"), ["roles gives hidden.* the role 'hiden'", "did you mean 'hidden'?"]),
    ((*TUNE, "roles={hiden.0.weight: hidden}"), ["did you mean 'hidden.0.weight'?"]),
    (("verify", "run", "--widths", "8"), ["at least two widths"]),
    (("verify", "run", "--widths", "8,0"), ["'0' is not a positive whole number"]),
    # A missing file.
    (("tune", "none.yaml"), ["there is no none.yaml", "mutransfer init"]),
    (("tune", "nothing"), ["nothing is a folder"]),
    (("tune", "file/experiment.yaml"), ["file/experiment.yaml", "Not a directory"]),
    (("tune", "words.yaml"), ["words.yaml", "keys and values"]),
    (("plan", "mlp", "--width", "16", "--recipe", "none.json"), ["there is no none.json"]),
    (("train", "none.json"), ["there is no none.json", "mutransfer transfer"]),
    (("audit", "run/target.json", "none.pt"), ["there is no none.pt"]),
    (("audit", "none.json", "run/train/checkpoint.pt"), ["there is no none.json"]),
    (("plan", "none.py:build", "--width", "16", "--base-width", "8"), ["there is no file none.py"]),
    ((*LANGUAGE, "data=text:none.txt"), ["there is no none.txt"]),
    # Widths that are not multiples of the head count.
    (("plan", "transformer", "--width", "40"), ["width 40 is not a multiple of the head dim 16"]),
    (("check", "transformer", "--widths", "32,40", "--data", "markov"), ["width 40 is not a multiple of the head dim 16"]),
    ((*LANGUAGE, "proxy.width=40"), ["width 40 is not a multiple of the head dim 16"]),
    (
        ("tune", "language.yaml", "--out", "new", "--set", "options={head_dim: null, heads: 6}"),
        ["width 16 is not a multiple of the head count 6"],
    ),
    (("verify", "language", "--widths", "16,40"), ["width 40 is not a multiple of the head dim 16"]),
    (("transfer", "language", "--width", "40"), ["width 40 is not a multiple of the head dim 16"]),
    # An optimizer without a rule.
    ((*TUNE, "optimizer=shampoo"), ["no scaling rule is known for the optimizer 'shampoo'", "adamw"]),
    ((*TUNE, "optimizer=lbfgs"), ["lbfgs has no rule that transfers", "use adamw"]),
    (("plan", "mlp", "--width", "16", "--optimizer", "adamm"), ["'adamm'", "did you mean 'adam'?"]),
    (("check", "mlp", "--widths", "8,16", "--optimizer", "shampoo"), ["no scaling rule is known for the optimizer 'shampoo'"]),
    # Adam with L2 weight decay.
    (("tune", "experiment.yaml", "--set", "optimizer=adam", "--set", "recipe.weight_decay=0.1"), ["L2", "use adamw"]),
    (("plan", "mlp", "--width", "16", "--optimizer", "adam", "--recipe", "recipe.json"), ["L2", "use adamw"]),
    # An empty or tiny corpus.
    ((*LANGUAGE, "data=text:empty.txt"), ["empty.txt is empty"]),
    ((*LANGUAGE, "data=text:tiny.txt"), ["tiny.txt has 1 tokens in its held-out part", "give a larger corpus"]),
    (("check", "transformer", "--widths", "16,32", "--data", "text:tiny.txt"), ["tiny.txt", "give a larger corpus"]),
    ((*LANGUAGE, "data=text:nothing"), ["nothing is empty"]),
    ((*LANGUAGE, "data=bin:tiny.txt"), ["tiny.txt has"]),
    # A run folder of another corpus hash.
    (("tune", "changed.yaml", "--out", "other", "--trials", "2"), ["other holds results on data with SHA-256", "--out"]),
    (("verify", "other"), ["other holds results on data with SHA-256"]),
    (("transfer", "other", "--width", "32"), ["other holds results on data with SHA-256"]),
    (("train", "other/target.json"), ["has the SHA-256"]),
    # A model file that raises on import; models and data that are not there, or do not fit.
    (("plan", "broken.py:build", "--width", "16", "--base-width", "8"), ["broken.py could not be imported", "OSError: the"]),
    (("check", "broken.py:build", "--widths", "8,16"), ["broken.py could not be imported", "line 1"]),
    ((*TUNE, "model=broken.py:build"), ["broken.py could not be imported"]),
    (("plan", "model.py:bild", "--width", "16", "--base-width", "8"), ["did you mean 'build'?"]),
    (("plan", "model.py", "--width", "16"), ["write model.py:name"]),
    (("plan", "model.py:build", "--width", "16"), ["--base-width"]),
    (("plan", "mlpp", "--width", "16"), ["unknown model 'mlpp'", "did you mean 'mlp'?"]),
    (("plan", "nowhere.at.all:build", "--width", "16", "--base-width", "8"), ["there is no module 'nowhere'"]),
    (("plan", "mlp", "--width", "16", "--data", "digitz"), ["unknown data 'digitz'", "did you mean 'digits'?"]),
    ((*TUNE, "data=bites"), ["unknown data 'bites'", "did you mean 'bytes'?"]),
    ((*TUNE, "data=markov"), ["mlp reads images", "holds tokens"]),
    ((*TUNE, "options.colour=red"), ["mlp does not take these options", "colour"]),
    (("plan", "mlp", "--width", "16", "--parametrization", "mupp"), ["'mupp'", "did you mean 'mup'?"]),
    (("check", "mlp", "--widths", "8,16", "--control", "spp"), ["'spp'", "did you mean 'sp'?"]),
    (("verify", "run", "--control", "spp"), ["'spp'", "did you mean 'sp'?"]),
    (("verify", "run", "--executor", "fusd"), ["--executor 'fusd' is not known", "did you mean 'fused'?"]),
    (("plan", "mlp", "--width", "16", "--width-field", "hidden_size"), ["--width-field", "mlp has none"]),
    (("plan", "hf:none.json", "--width", "16"), ["there is no file none.json"]),
    (("plan", "hf:words.yaml", "--width", "16"), ["words.yaml is not JSON"]),
    # A batch or a loss that cannot be trained on.
    (("check", "faulty.py:labels", "--widths", "8,16"), ["raised on its example batch (IndexError: Target 9 is out of bounds)"]),
    (("check", "faulty.py:detached", "--widths", "8,16"), ["the loss of model has no gradient"]),
    (("check", "faulty.py:nan", "--widths", "8,16"), ["the example batch of model holds NaN"]),
    ((*TUNE, "model=faulty.py:alone"), ["faulty.py:alone cannot be trained on digits", "(inputs, targets)"]),
    # What is no run folder, or another one's.
    (("verify", "nothing"), ["nothing is not a run folder", "mutransfer tune"]),
    (("verify", "nowhere"), ["nowhere is not a run folder", "mutransfer tune"]),
    (("verify", "file"), ["file is not a run folder"]),
    (("transfer", "nothing", "--width", "16"), ["nothing is not a run folder", "mutransfer tune"]),
    (("report", "nowhere"), ["there is no folder nowhere", "mutransfer tune"]),
    (("report", "nothing"), ["nothing holds nothing to report"]),
    (("report", "file"), ["there is no folder file"]),
    (("verify", "unfinished"), ["unfinished/best.json", "mutransfer tune"]),
    (("transfer", "unfinished", "--width", "16"), ["unfinished/best.json", "mutransfer tune"]),
    (("tune", "experiment.yaml", "--out", "run", "--set", "steps=9"), ["run holds a study with steps = 8", "another --out"]),
    (("tune", "experiment.yaml", "--out", "run", "--seed", "9"), ["run holds a study with seed = 0"]),
    (("train", "run/best.json"), ["holds a recipe, so it is not a target config", "mutransfer transfer"]),
    (("train", "file"), ["file is not valid JSON"]),
    (("audit", "run/target.json", "run/best.json"), ["expected an optimizer's state_dict"]),
    (("audit", "run/target.json", "file"), ["file is not valid JSON"]),
    (("train", "language/target.json", "--out", "run/train"), ["checkpoint.pt belongs to another target", "another --out"]),
    # Where nothing can be written.
    (("tune", "experiment.yaml", "--out", "file"), ["cannot write file"]),
    (("tune", "experiment.yaml", "--out", "file/run"), ["cannot write file/run", "--out"]),
    (("tune", "experiment.yaml", "--out", "/sys/new"), ["cannot write /sys/new", "--out"]),  # not even for root
    (("tune", "experiment.yaml", "--out", "/proc/new"), ["cannot create the folder /proc/new", "--out"]),
    (("tune", "experiment.yaml", "--out", "new", "--storage", "journal:/sys/x.journal"), ["journal:/sys/x.journal", "check its"]),
    (("transfer", "run", "--width", "16", "--out", "file/target.json"), ["cannot write file/target.json", "--out"]),
    (("transfer", "run", "--width", "16", "--out", "nothing"), ["cannot write nothing", "--out"]),
    (("transfer", "run", "--width", "24", "--to", "pytorch", "--out", "file/x"), ["cannot write file/x", "--out"]),
    (("check", "mlp", "--widths", "8,16", "--seeds", "1", "--out", "file/x"), ["cannot write file/x", "--out"]),
    (("train", "run/target.json", "--out", "file/x"), ["cannot write file/x", "--out"]),
    (("init", "file"), ["cannot write file/experiment.yaml"]),
    (("init", "."), ["experiment.yaml already exists", "--force"]),
    # Other values of flags.
    (("transfer", "run", "--width", "16", "--to", "pytorhc"), ["unknown format 'pytorhc'", "did you mean 'pytorch'?"]),
    (("transfer", "run", "--width", "16", "--to", "megatron"), ["'megatron' is not supported in this version", "--to pytorch"]),
    (("tune", "experiment.yaml", "--out", "new", "--device", "gpu"), ["--device 'gpu'", "auto, cpu or cuda"]),
    (("tune", "experiment.yaml", "--out", "new", "--storage", "sqlite:////none/at/all.db"), ["sqlite:////none/at/all.db"]),
    (("tune", "experiment.yaml", "--out", "new", "--storage", "nosuch://x"), ["nosuch://x"]),
    (
        ("tune", "experiment.yaml", "--out", "new", "--storage", "postgresql://ann:s3cret@127.0.0.1:1/x"),
        ["cannot open the storage postgresql://ann:***@127.0.0.1:1/x", "refused", "check that it runs"],
    ),
    (
        ("tune", "experiment.yaml", "--out", "new", "--storage", "journal:experiment.yaml"),
        ["experiment.yaml is not a study journal"],
    ),
    (("tune", "experiment.yaml", "--out", "new", "--lease", "0"), ["--lease", "greater than or equal to 1"]),
    (("tune", "experiment.yaml", "--executor", "process"), ["--executor 'process'", "did you mean 'processes'?"]),
    (("tune", "experiment.yaml", "--executor", "one", "--at-once", "4"), ["--at-once 4 needs --executor processes or fused"]),
    (("tune", "experiment.yaml", "--precision", "fp8"), ["--precision 'fp8'", "float32"]),
    (("tune", "experiment.yaml", "--executor", "one", "--precision", "bfloat16"), ["needs --executor fused"]),
    (("tune", "experiment.yaml", "--set", "steps"), ["--set 'steps'", "key=value"]),
    (("plan", "mlp"), ["Missing option '--width'"]),
    (("plan", "mlp", "--width", "wide"), ["'--width'", "valid integer"]),
    (("plan", "mlp", "--widht", "16"), ["No such option: --widht", "--width"]),
    (("plam", "mlp"), ["No such command 'plam'"]),
]  # fmt: skip


def assert_one_sentence(ended: Ended, said: list[str]) -> None:
    assert ended.code == 2, ended
    assert ended.out == ""
    lines = [line for line in ended.err.splitlines() if not PROGRESS.fullmatch(line)]
    assert len(lines) == 1, ended.err
    (sentence,) = lines
    assert sentence.startswith("mutransfer: ")
    assert sentence.endswith((".", "?", "--help)")), sentence
    assert all(part in sentence for part in said), sentence


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=lambda part: " ".join(part)[:70])
def test_a_wrong_request(arguments: tuple[str, ...], said: list[str], shop: Path, commands: Processes) -> None:
    before = contents(shop)
    ended = commands.run(*arguments, cwd=shop)
    assert_one_sentence(ended, said)
    assert contents(shop) == before


def test_labels_that_the_model_has_no_logits_for(shop: Path, commands: Processes) -> None:
    """Seen in the first trial only, after the folder is made."""
    ended = commands.run(*TUNE, "model=faulty.py:labels", cwd=shop)
    assert_one_sentence(ended, ["raised on a batch (inputs, targets) of digits (IndexError: Target"])


@pytest.mark.extended
def test_a_gpu_that_is_not_there(shop: Path) -> None:
    before = contents(shop)
    program = [sys.executable, "-c", "from mutransfer.cli import main; main()"]
    ended = subprocess.run(
        [*program, "tune", "experiment.yaml", "--out", "new", "--device", "cuda"],
        cwd=shop, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert_one_sentence(Ended(ended.returncode, ended.stdout, ended.stderr), ["--device cuda", "--device cpu"])
    assert contents(shop) == before


def test_the_same_sentence_with_json(shop: Path, commands: Processes) -> None:
    assert_one_sentence(commands.run("verify", "nothing", "--json", cwd=shop), ["nothing is not a run folder"])


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("plan", "mlp", "--width", "32", "--base-width", "64"), "out"),
        (("transfer", "run", "--width", "4"), "err"),
    ],
)
def test_a_target_smaller_than_the_base_is_allowed_and_said(
    arguments: tuple[str, ...], where: str, shop: Path, commands: Processes
) -> None:
    ended = commands.run(*arguments, cwd=shop)
    assert ended.code == 0
    assert "smaller than the base" in getattr(ended, where)


# Bytes that a file may have: before the first file is whole, within the journal, within a later trials.csv.
@pytest.mark.parametrize("limit", extended_but([0, 300, 3000, 9000], 3000))
def test_a_disk_that_fills_while_tuning(limit: int, shop: Path, commands: Processes) -> None:
    tuning = ("tune", "experiment.yaml", "--out", "new", "--trials", "24")
    ended = commands.run(*tuning, cwd=shop, limit=limit)
    assert_one_sentence(ended, ["no space left to write", "new", "free some disk space"])
    left = {path.name for path in (shop / "new").iterdir()}
    assert left <= {".lock", "experiment.yaml", "environment.json", "study.journal", "trials.csv"}
    assert ("study.journal" in left) == (limit >= 3000)

    resumed = commands.run(*tuning, "--json", cwd=shop)
    assert resumed.code == 0, resumed.err
    assert resumed.json["finished"] == 24
    trials = TRIALS.read(shop / "new" / "trials.csv")
    assert trials["state"].isin(["COMPLETE", "PRUNED"]).sum() == 24
    assert set(trials["state"]) <= {"COMPLETE", "PRUNED", "FAIL"}


@pytest.mark.extended
def test_a_disk_that_fills_under_a_shared_journal(shop: Path, commands: Processes) -> None:
    tuning = ("tune", "experiment.yaml", "--out", "new", "--trials", "24", "--storage", "journal:shared.journal")
    ended = commands.run(*tuning, "--lease", "1", cwd=shop, limit=6000)
    assert_one_sentence(ended, ["no space left to write shared.journal", "free some disk space"])
    resumed = commands.run(*tuning, "--lease", "1", "--json", cwd=shop)
    assert resumed.code == 0, resumed.err
    assert resumed.json["finished"] == 24


def test_a_storage_with_a_study_of_another_search_space(shop: Path, commands: Processes) -> None:
    shared = ("--storage", "journal:shared.journal")
    assert commands.run("tune", "experiment.yaml", "--out", "one", *shared, cwd=shop).code == 0
    before = (shop / "shared.journal").read_bytes()
    other = ("--set", "search={beta2: {low: 0.9, high: 0.99}}")
    ended = commands.run("tune", "experiment.yaml", "--out", "two", *other, *shared, cwd=shop)
    assert_one_sentence(ended, ["the study 'mutransfer' was made with search = ", "name another --study"])
    after = (shop / "shared.journal").read_bytes()
    assert after.startswith(before)
    assert b"beta2" not in after  # Optuna notes that the study was asked for


def test_a_sweep_in_which_all_diverge(shop: Path, commands: Processes) -> None:
    wild = ("--set", f"search.lr.low={2.0**30}", "--set", f"search.lr.high={2.0**40}")
    ended = commands.run("tune", "experiment.yaml", "--out", "new", *wild, cwd=shop)
    assert_one_sentence(ended, ["all 3 trials diverged", "lower search.lr", "another --out"])
    trials = TRIALS.read(shop / "new" / "trials.csv")
    assert trials["diverged"].all()
    assert not (shop / "new" / "best.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("transfer", "run", "--width", "32"),
        ("transfer", "run", "--width", "32", "--out", "new/target.json"),
        ("transfer", "run", "--width", "32", "--to", "pytorch"),
        ("init", "new"),
        ("train", "run/target.json", "--out", "fresh"),
        ("report", "run"),
    ],
)
def test_a_disk_that_is_full_when_results_are_written(
    arguments: tuple[str, ...], shop: Path, commands: Processes
) -> None:
    before = contents(shop)
    ended = commands.run(*arguments, cwd=shop, limit=500)
    assert_one_sentence(ended, ["no space left to write", "free some disk space"])
    after = contents(shop)
    assert {name: after[name] for name in before} == before
    assert all(content is None for name, content in after.items() if name not in before)  # at most an empty folder


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_full_disk_under_the_result(flags: tuple[str, ...], shop: Path, commands: Processes) -> None:
    ended = commands.run("plan", "mlp", "--width", "16", *flags, cwd=shop, stdout="/dev/full")
    assert_one_sentence(ended, ["no space left to write the result"])
    ended = commands.run("plan", "mlp", "--width", "16", *flags, cwd=shop, stdout=str(shop / "plan.txt"), limit=100)
    assert_one_sentence(ended, ["no space left to write the result"])
