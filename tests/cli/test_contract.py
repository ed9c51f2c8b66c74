"""The command contract: exit codes, and one JSON object on stdout with the keys that others build on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mutransfer.cli import run
from mutransfer.export import FORMATS
from mutransfer.io import as_json_value
from mutransfer.planning import build
from mutransfer.planning.target import KEYS, TargetConfig
from mutransfer.recipe import Recipe
from mutransfer.schemas import BASINS, COORDINATES, TRIALS
from mutransfer.sweeps.experiment import Experiment

from ..helpers.processes import Processes, validated
from ..helpers.sets import extended_but

PARAMETER = {
    "name", "shape", "role", "m_in", "m_out", "init_std", "lr", "weight_decay", "eps", "lr_factor", "wd_factor", "eps_factor",
    "init_factor",
}  # fmt: skip


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1, (out, err)
    return code, validated(arguments[0], out)


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = in_process(capsys, "plan", "transformer", "--width", "128", "--data", "markov")
    assert code == 0
    assert set(told) >= {"parameters", "groups"}
    assert all(set(row) >= PARAMETER for row in told["parameters"])
    assert {row["role"] for row in told["parameters"]} <= {
        "input",
        "vector",
        "hidden",
        "output",
        "bottleneck",
        "finite",
    }
    assert all(set(group) == {"lr", "weight_decay", "eps", "count"} for group in told["groups"])
    assert sum(group["count"] for group in told["groups"]) == len(told["parameters"])
    hidden = next(row for row in told["parameters"] if row["role"] == "hidden")
    assert (hidden["m_in"], hidden["lr_factor"], hidden["init_factor"]) == (2, 0.5, 2**-0.5)
    assert [row["init_factor"] for row in told["parameters"] if row["name"].endswith("norm.weight")][:1] == [None]


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 64}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "name", "shape", "width", "depth"),
    [
        (GPT2, "transformer.h.0.attn.c_attn.weight", [128, 384], {"n_embd": [32, 128], "n_head": [4, 16]}, "n_layer"),
        (
            LLAMA, "model.layers.1.self_attn.k_proj.weight", [64, 128],
            {"hidden_size": [32, 128], "intermediate_size": [96, 384], "num_attention_heads": [4, 16],
             "num_key_value_heads": [2, 8]}, "num_hidden_layers",
        ),
    ],
)  # fmt: skip
def test_plan_of_a_transformers_config(
    config: dict[str, Any], name: str, shape: list[int], width: dict[str, Any], depth: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, told = in_process(capsys, "plan", f"hf:{tmp_path}", "--width", "128")
    assert code == 0
    assert told["fields"] == {"width": width, "depth": {depth: [2, 2]}, "head_dim": {"head_dim": [8, 8]}}
    row = next(row for row in told["parameters"] if row["name"] == name)
    assert (row["shape"], row["role"], row["m_in"], row["lr_factor"]) == (shape, "hidden", 4, 0.25)
    assert row["init_std"] == pytest.approx(0.02 / 2)  # the config's own initializer_range
    # The same target from a base of its own: twice as wide.
    code, told = in_process(capsys, "plan", f"hf:{tmp_path}", "--width", "128", "--base-width", "64")
    row = next(row for row in told["parameters"] if row["name"] == name)
    assert (row["shape"], row["m_in"]) == (shape, 2)


def test_the_plan_of_a_config_says_what_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    fields = ("--width-field", "hidden_size", "--width-field", "intermediate_size")
    assert run(["plan", f"hf:{tmp_path}", "--width", "64", *fields, "--depth", "4"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line == (
        "grows with width: hidden_size 32→64, intermediate_size 96→192; head dim stays 8; depth: num_hidden_layers 2→4"
    )


@pytest.mark.extended
def test_check_of_a_transformers_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    arguments = ("--widths", "32,64,128", "--seeds", "2", "--steps", "1", "--control", "sp")
    code, told = in_process(capsys, "check", f"hf:{tmp_path}", *arguments)
    assert {row["module"] for row in told["modules"]} >= {"model.layers.0.self_attn.q_proj", "lm_head"}
    assert told["verdict"] in ("pass", "undecided"), told["cause"]  # two seeds are few
    assert (code == 0, told["control"]["verdict"]) == (told["verdict"] == "pass", "fail")


def test_plan_builds_nothing_for_real(commands: Processes, tmp_path: Path) -> None:
    told = commands.run("plan", "mlp", "--width", str(2**20), "--json", cwd=tmp_path).json
    assert [2**20, 2**20] in [row["shape"] for row in told["parameters"]]


@pytest.mark.parametrize("parametrization", extended_but(["mup", "sp"], "mup"))
def test_check(parametrization: str, commands: Processes, tmp_path: Path) -> None:
    asked = ("check", "mlp", "--widths", "32,128,512", "--seeds", "3", "--steps", "2", "--out", "seen", "--json")
    ended = commands.run(*asked, "--parametrization", parametrization, "--control", "sp", cwd=tmp_path)
    told = ended.json
    assert set(told) >= {"verdict", "modules", "cause", "control", "report"}
    slope = {"module", "statistic", "step", "slope", "low", "high", "expected", "declared", "ok"}
    assert all(set(row) >= slope for row in told["modules"])
    assert ended.code == (0 if told["verdict"] == "pass" else 1)
    assert told["control"]["verdict"] == "fail"
    if parametrization == "sp":
        assert told["verdict"] == "fail"
        assert any(row["module"] in told["cause"] for row in told["modules"] if row["ok"] is False)
    else:
        assert told["verdict"] == "pass"
    assert (tmp_path / told["report"]).is_file()
    assert len(COORDINATES.read(tmp_path / "seen" / "coordinates.csv"))


def test_an_undecided_check_does_not_pass(commands: Processes, tmp_path: Path) -> None:
    ended = commands.run("check", "mlp", "--widths", "8,16", "--seeds", "2", "--steps", "2", "--json", cwd=tmp_path)
    assert ended.json["verdict"] in ("undecided", "fail")
    assert ended.code == 1


def test_init(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, told = in_process(capsys, "init", str(tmp_path / "new"))
    path = tmp_path / "new" / "experiment.yaml"
    assert (code, told) == (0, {"path": str(path)})
    assert list(path.parent.iterdir()) == [path]
    assert Experiment.load(path).trials == 24
    path.write_text("model: mlp")
    assert in_process(capsys, "init", str(tmp_path / "new"), "--force")[0] == 0
    assert Experiment.load(path).trials == 24


def test_doctor(commands: Processes, tmp_path: Path) -> None:
    ended = commands.run("doctor", "--json", cwd=tmp_path)
    told = ended.json
    assert all(set(check) == {"name", "ok", "detail", "fix"} for check in told["checks"])
    assert {"torch", "mup", "optuna", "gpu", "disk"} <= {check["name"] for check in told["checks"]}
    assert ended.code == (0 if all(check["ok"] for check in told["checks"]) else 1)
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_how_to_mend_what_is_not_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken torchvision, which mup brings along, fails a person's own import of transformers."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    run(["doctor"])
    out = capsys.readouterr().out
    assert re.search(r"^note torchvision .* is broken", out, re.MULTILINE)
    assert re.search(r"^fix torchvision: pip uninstall torchvision", out, re.MULTILINE)


def test_tune(commands: Processes, shop: Path) -> None:
    asked = ("tune", "experiment.yaml", "--out", "new", "--trials", "4", "--set", "steps=6", "--seed", "3", "--json")
    ended = commands.run(*asked, cwd=shop)
    told = ended.json
    assert ended.code == 0
    assert set(told) >= {"trials", "finished", "diverged", "pruned", "best", "seconds", "run"}
    assert (told["trials"], told["finished"]) == (4, 4)
    assert set(told["best"]) == {"value", "params"}
    assert told["run"] == "new"
    assert {path.name for path in (shop / "new").iterdir()} == {
        "experiment.yaml", "study.journal", "trials.csv", "best.json", "environment.json", ".lock",
    }  # fmt: skip
    resolved = Experiment.load(shop / "new" / "experiment.yaml")
    assert (resolved.steps, resolved.seed, resolved.trials) == (6, 3, 4)
    assert Recipe.load(shop / "new" / "best.json").lr == told["best"]["params"]["lr"]
    assert TRIALS.read(shop / "new" / "trials.csv")["value"].min() == told["best"]["value"]
    noted = json.loads((shop / "new" / "environment.json").read_text())
    assert {"versions", "device", "seed", "data_sha256", "commands"} <= set(noted)
    assert noted["commands"] == ["mutransfer " + " ".join(asked)]
    assert commands.run(*asked, cwd=shop).json["trials"] == 4


def test_tune_without_out_makes_a_folder_below_runs(commands: Processes, shop: Path) -> None:
    told = commands.run("tune", "language.yaml", "--json", cwd=shop).json
    assert told["run"] == "runs/language"
    told = commands.run("tune", "./experiment.yaml", "--trials", "1", "--json", cwd=shop).json
    assert told["run"] == "runs/experiment"
    (shop / "nothing" / "experiment.yaml").write_text((shop / "experiment.yaml").read_text())
    told = commands.run("tune", "nothing/experiment.yaml", "--trials", "1", "--json", cwd=shop).json
    assert told["run"] == "runs/nothing"


@pytest.mark.extended
def test_verify(commands: Processes, shop: Path) -> None:
    ended = commands.run("verify", "run", "--widths", "8,16", "--seeds", "2", "--control", "sp", "--json", cwd=shop)
    told = ended.json
    assert set(told) >= {"verdict", "optimum_log2_lr", "drift_octaves", "regret", "price"}
    assert ended.code == (0 if told["verdict"] == "pass" else 1)
    for measured in (told["drift_octaves"], told["regret"]):
        assert set(measured) == {"mup", "sp"}
        assert set(measured["mup"]) == {"8", "16"}
        assert set(measured["mup"]["16"]) == {"value", "low", "high"}
    names = {"tuning_flops", "repeats_flops", "verify_flops", "target_flops", "ratio", "uncounted"}
    assert set(told["price"]) == names
    assert told["price"]["uncounted"] == []
    assert told["price"]["repeats_flops"] is None  # the experiment asks for none
    basins = BASINS.read(shop / "run" / "basins.csv")
    assert told["price"]["verify_flops"] == basins["flops"].sum() > told["price"]["target_flops"]
    assert told["price"]["target_flops"] == basins.loc[basins["width"].eq(16) & ~basins["diverged"], "flops"].max()
    assert told["price"]["ratio"] == told["price"]["tuning_flops"] / told["price"]["target_flops"]
    assert json.loads((shop / "run" / "verify.json").read_text()) == told
    assert set(BASINS.read(shop / "run" / "basins.csv")["parametrization"]) == {"mup", "sp"}
    # The control is tuned where it is compared, with as many trials as the proxy had.
    finished = TRIALS.read(shop / "run" / "trials.csv")["state"].isin(["COMPLETE", "PRUNED"]).sum()
    control = told["control"]
    assert (control["parametrization"], control["trials"], control["searched"]) == ("sp", finished, ["lr"])
    assert control["params"] == {"lr": pytest.approx(2 ** told["comparison"][-1]["log2_lr"])}
    assert len(TRIALS.read(shop / "run" / "control-sp-16" / "trials.csv")) == finished
    assert [row["label"].split(",")[0] for row in told["comparison"]] == ["µP", "µP", "SP", "SP", "SP"]
    assert "control: sp is tuned at width 16 as well, with 3 trials and 2 seeds" in ended.err


@pytest.mark.extended
def test_a_control_may_keep_our_other_values_and_says_so(commands: Processes, shop: Path) -> None:
    asked = ("verify", "run", "--widths", "8,16", "--seeds", "2", "--control", "sp", "--control-trials", "0", "--json")
    told = commands.run(*asked, cwd=shop).json
    assert (told["control"]["trials"], told["control"]["searched"], told["control"]["flops"]) == (0, ["lr"], None)
    assert "SP, learning rate alone tuned at width 16, other values as µP's" in told["control"]["conclusion"]
    assert not (shop / "run" / "control-sp-16").exists()
    assert len(told["comparison"]) == 4
    assert commands.run("verify", "run", "--widths", "8,16", "--seeds", "2", "--json", cwd=shop).json["control"] is None


def test_transfer(commands: Processes, shop: Path) -> None:
    ended = commands.run(
        "transfer", "run", "--width", "64", "--depth", "3", "--batch-size", "32", "--tokens", "1000", "--json", cwd=shop
    )
    told = ended.json
    assert ended.code == 0
    assert tuple(told) == KEYS
    assert told["scale"] == {"width": 64, "depth": 3, "batch": 32, "tokens": told["tokens"]}
    assert (told["batch_size"], told["steps"]) == (32, 32)  # 1000 / 32, rounded up
    assert told["warnings"]
    assert ended.err.count("warning: ") == len(told["warnings"])
    assert ended.err.count("note: ") == len(told["notes"])
    assert not set(told["warnings"]) & set(told["notes"])
    for command in ("`mutransfer verify run`", "`mutransfer check run/experiment.yaml --out run --widths 8,16,32,64 "):
        assert any(command in warning for warning in told["warnings"])
    assert json.loads((shop / "run" / "target.json").read_text()) == told
    assert TargetConfig.load(shop / "run" / "target.json").plan.scale.width == 64


def test_transfer_to_a_framework(commands: Processes, shop: Path) -> None:
    before = (shop / "run" / "target.json").read_bytes()
    ended = commands.run(
        "transfer", "run", "--width", "64", "--to", "pytorch", "--out", "here/it.json", "--json", cwd=shop
    )
    assert ended.code == 0
    exported = json.loads((shop / "here" / "it.json").read_text())
    assert exported["scale"]["width"] == 64
    assert (shop / "run" / "target.json").read_bytes() != before
    commands.run("transfer", "run", "--width", "16", "--out", "here/target.json", cwd=shop)
    assert TargetConfig.load(shop / "here" / "target.json").plan.scale.width == 16
    assert TargetConfig.load(shop / "run" / "target.json").plan.scale.width == 64
    assert set(FORMATS) >= {"pytorch", "transformers", "torchtitan", "megatron", "lightning"}


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_train(flags: tuple[str, ...], commands: Processes, shop: Path) -> None:
    ended = commands.run("train", "run/target.json", "--out", "big", *flags, cwd=shop)
    assert ended.code == 0
    assert (shop / "big" / "checkpoint.pt").is_file()
    again = commands.run("train", "run/target.json", "--out", "big", *flags, cwd=shop)
    assert again.code == 0, again.err
    if flags:
        told = ended.json
        assert set(told) >= {"loss", "steps", "tokens_per_second", "checkpoint"}
        assert (told["steps"], told["checkpoint"]) == (8, "big/checkpoint.pt")
        assert again.json == told | {"tokens_per_second": None}
    else:
        assert "nothing left to do" in again.out


def test_train_says_that_it_diverged(commands: Processes, shop: Path) -> None:
    (shop / "run" / "best.json").write_text('{"lr": 1e30, "warmup": 0.0}')
    assert commands.run("transfer", "run", "--width", "16", "--out", "wild.json", cwd=shop).code == 0
    ended = commands.run("train", "wild.json", "--out", "wild", "--json", cwd=shop)
    assert (ended.code, ended.json["loss"]) == (1, None)
    ended = commands.run("train", "wild.json", "--out", "wild", cwd=shop)
    assert (ended.code, "diverged after" in ended.out) == (1, True), ended.err


def test_audit(commands: Processes, shop: Path) -> None:
    ended = commands.run("audit", "run/target.json", "run/train/checkpoint.pt", "--json", cwd=shop)
    assert (ended.code, ended.json) == (0, {"verdict": "pass", "differences": []})
    commands.run("transfer", "run", "--width", "16", "--out", "mine.json", cwd=shop)
    planned = json.loads((shop / "mine.json").read_text())["parameters"]
    kept = ("weight_decay", "eps")
    groups = [
        {"lr": 1e-3, "betas": [0.9, 0.95], "param_names": [row["name"]], **{key: row[key] for key in kept}}
        for row in planned
    ]
    (shop / "dump.json").write_text(json.dumps({"param_groups": groups}))
    ended = commands.run("audit", "mine.json", "dump.json", "--json", cwd=shop)
    assert (ended.code, ended.json["verdict"]) == (1, "fail")
    assert all(set(row) == {"name", "setting", "planned", "found"} for row in ended.json["differences"])
    assert {row["setting"] for row in ended.json["differences"]} == {"lr"}
    assert "verdict: fail" in commands.run("audit", "mine.json", "dump.json", cwd=shop).out


def test_report(commands: Processes, shop: Path) -> None:
    ended = commands.run("report", "run", "--json", cwd=shop)
    assert (ended.code, ended.json) == (0, {"report": "run/report.html"})
    assert "<svg" in (shop / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "mlp", "--width", "32"),
        ("init", "new"),
        ("tune", "experiment.yaml", "--out", "run"),
        ("transfer", "run", "--width", "16"),
        ("audit", "run/target.json", "run/train/checkpoint.pt"),
        ("report", "run"),
    ],
)
def test_without_json_a_person_is_told(arguments: tuple[str, ...], commands: Processes, shop: Path) -> None:
    ended = commands.run(*arguments, cwd=shop)
    assert ended.code == 0
    assert ended.out.strip()
    with pytest.raises(json.JSONDecodeError):
        json.loads(ended.out)


def test_json_has_no_nan() -> None:
    given = {"a": [float("nan"), 1.5, (float("-inf"),)], 3: {"b": TRIALS.frame([])["value"].mean()}}
    assert as_json_value(given) == {"a": [None, 1.5, [None]], "3": {"b": None}}


def test_ctrl_c_is_130_and_a_bug_is_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails_with(error: BaseException) -> tuple[int, str]:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(build, "plan", fail)
        code = run(["plan", "mlp", "--width", "16", "--json"])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    code, err = fails_with(KeyboardInterrupt())
    assert (code, err) == (130, "mutransfer: interrupted; run the same command again to continue.\n")
    code, err = fails_with(ZeroDivisionError("nobody thought of this"))
    assert code == 3
    assert "Traceback" in err
    assert "ZeroDivisionError: nobody thought of this" in err
    assert err.endswith("mutransfer: this is a bug; please report it with the traceback above.\n")
