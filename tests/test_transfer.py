"""Target configs: what they hold, what they warn about, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.io import write_json
from mutransfer.planning.target import KEYS, TargetConfig, of_evidence, regularizers, target_config
from mutransfer.recipe import Recipe, Scale
from mutransfer.run_dir import RunFolder

from .helpers import families
from .helpers.planned import plan_of

QUIET = Scale(64, 2)


def plan(scale: Scale = QUIET, **recipe: Any) -> mt.Plan:
    return plan_of(families.transformer(), scale, recipe=Recipe(**{"lr": 2**-7, "clip": 1.0, **recipe}))


def config(planned: mt.Plan | None = None, **changes: Any) -> TargetConfig:
    settings: dict[str, Any] = {
        "model": "transformer", "options": {"head_dim": 16}, "data": "markov", "sequence_length": 12, "proxy": Scale(32, 2),
        "proxy_batch_size": 8, "proxy_steps": 50, "batch_size": 8, "steps": 50, "tuned": ["lr"], "seed": 3,
        "provenance": {"data_sha256": "ab"},
    }  # fmt: skip
    return target_config(planned or plan(), **{**settings, **changes})


def refusal(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        TargetConfig.load(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence
    return sentence


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    target = config(tuned=["lr", "weight_decay"], batch_size=16)
    assert target.warnings
    assert TargetConfig.load(target.save(tmp_path / "target.json")) == target


def test_the_file_holds_what_a_trainer_needs() -> None:
    data = json.loads(json.dumps(config().as_dict(), allow_nan=False))
    assert tuple(data) == KEYS
    assert data["format"] == "mutransfer-target/1"
    assert data["optimizer"] == {"name": "adamw", "torch_name": "AdamW", "settings": {"betas": [0.9, 0.95]}}
    assert data["schedule"] == {"name": "cosine", "warmup": 0.1, "cooldown": 0.2, "final": 0.0, "steps": 50}
    assert data["clip"] == 1.0
    assert data["tokens"] == 8 * 50 * 12
    assert data["scale"] == {"width": 64, "depth": 2, "batch": 8, "tokens": data["tokens"]}
    assert data["parameters"] == json.loads(json.dumps(plan().as_dict()["parameters"]))
    assert sum(group["count"] for group in data["groups"]) == len(data["parameters"])
    assert data["provenance"]["proxy"] == {"width": 32, "depth": 2, "batch": 8, "tokens": None, "steps": 50}
    assert data["provenance"]["tuned"] == ["lr"]


def test_nothing_is_said_where_everything_transfers() -> None:
    assert config(tuned=["lr", "alpha_output", "schedule", "betas", "warmup"]).warnings == ()
    quiet = {"alpha_attention": 2.0, "betas": (0.8, 0.9), "warmup": 0.3, "weight_decay": 0.0}
    assert config(plan(**quiet), options={"head_dim": 16, "dropout": 0.0, "label_smoothing": None}).warnings == ()


def test_the_initial_scale_is_only_said_to_move_where_the_width_does() -> None:
    (warning,) = config(plan(init_scale=0.7), proxy=Scale(16, 2), tuned=["lr"]).warnings
    assert "init_scale (0.7) was set for" in warning
    assert "about +0.5 octaves from width 16 to 64" in warning  # a factor of 4
    assert config(plan(init_scale=0.7), proxy=Scale(64, 2)).warnings == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tuned": ["weight_decay"]}, ["weight_decay (0.0) was tuned on", "regularization"]),
        ({"planned": plan(weight_decay=0.1)}, ["weight_decay (0.1) was set for", "regularization"]),
        ({"planned": plan(weight_decay=0.1), "tuned": ["weight_decay"]}, ["weight_decay (0.1) was tuned on"]),
        ({"tuned": ["init_scale"]}, ["init_scale (1.0)", "half an octave"]),
        ({"options": {"resid_pdrop": 0.1}}, ["resid_pdrop (0.1)", "regularization"]),
        ({"options": {"head": {"label_smoothing": 0.1}}}, ["head.label_smoothing (0.1)", "regularization"]),
        ({"options": {"drop_path_rate": 0.2, "qkv_bias": True}}, ["drop_path_rate (0.2)", "regularization"]),
        ({"options": {"warmup_steps": 100}}, ["warmup_steps (100)", "tied to batch or length"]),
        ({"regularizers": {"blocks.*.drop": 0.1}}, ["blocks.*.drop", "0.1", "regularization"]),
        ({"planned": plan(betas=(0.8, 0.9)), "batch_size": 32}, ["betas ((0.8, 0.9)) was set for", "m_B = 4"]),
        ({"planned": plan(eps=1e-4), "steps": 500}, ["eps (0.0001) was set for", "m_D = 10"]),
        ({"planned": plan(warmup=0.3), "steps": 500}, ["warmup (0.3) was set for", "m_D = 10"]),
        ({"batch_size": 32}, ["clip (1.0) was set for", "m_B = 4"]),
        ({"unproven": ["nobody looked."]}, ["nobody looked."]),
        ({"tuned": ["options.attention_dropout"]}, ["attention_dropout", "regularization"]),
        ({"tuned": ["batch_size"]}, ["batch_size", "tied to batch"]),
        ({"tuned": ["frobnication"]}, ["frobnication", "not known"]),
        ({"tuned": ["betas"], "batch_size": 32, "steps": 50}, ["betas", "m_B = 4", "m_D = 4"]),
        ({"tuned": ["recipe.warmup"], "steps": 500}, ["warmup (0.1)", "m_D = 10"]),
        ({"batch_size": 32}, ["batch grows 4x (8 to 32 examples)", "no batch or duration law is applied"]),
        ({"steps": 500}, ["data grows 10x (400 to 4000 examples)", "no batch or duration law is applied"]),
        ({"proxy": Scale(32, 1)}, ["depth goes from 1 in the proxy to 2", "no rule for depth"]),
    ],
)
def test_what_does_not_transfer_is_said(changes: dict[str, Any], expected: list[str]) -> None:
    warnings = config(**changes).warnings
    assert any(all(part in warning for part in expected) for warning in warnings), warnings
    assert all(warning.endswith(".") for warning in warnings)


@pytest.mark.parametrize(
    ("recipe", "changes", "word"),
    [
        ({"momentum": 0.5}, {"batch_size": 32}, "momentum"),  # adamw has none
        ({"cooldown": 0.3}, {"steps": 500}, "cooldown"),  # only the schedule wsd has one
        ({"law": "sqrt", "betas": (0.8, 0.9)}, {"batch_size": 16}, "betas"),  # the law sets them
        ({}, {"options": {"weight_decay": 0, "l2": 0.0, "droplet": "dropout"}, "tuned": ["lr"]}, "droplet"),
    ],
)
def test_what_nothing_reads_or_a_law_sets_is_not_warned_of(recipe: Any, changes: Any, word: str) -> None:
    assert not [text for text in config(plan(**recipe), **changes).warnings if word in text]


def test_a_value_tied_to_the_length_alone_is_not_blamed_for_the_batch() -> None:
    assert not [text for text in config(tuned=["warmup"], batch_size=16, steps=25).warnings if "warmup" in text]


@pytest.mark.parametrize(("scale", "said"), [(Scale(64, 4), "depth"), (Scale(16, 2), "smaller than the base")])
def test_a_scale_without_a_rule_is_a_warning_said_once(scale: Scale, said: str) -> None:
    warnings = config(plan(scale)).warnings
    assert [said in warning for warning in warnings] == [True]


def test_a_note_is_no_warning() -> None:
    planned = plan_of(families.transformer(), QUIET, optimizer="muon", recipe=Recipe(lr=2**-7))
    assert planned.notes
    target = config(planned)
    assert target.warnings == ()
    assert target.as_dict()["notes"] == list(planned.notes)


class Regularized(torch.nn.Module):
    """Dropout of every kind: a module, an attribute, a function in the forward pass, a smoothed loss."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.embed, self.readout = torch.nn.Linear(8, width), torch.nn.Linear(width, 5)
        self.blocks = torch.nn.ModuleList(torch.nn.MultiheadAttention(width, 2, rate) for _ in range(2))
        self.drop, self.rate = torch.nn.Dropout(rate and 0.3), rate and 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x, x, x)[0]
        return self.readout(F.dropout(self.drop(x), self.rate, self.training))


@pytest.mark.parametrize("trained", [True, False])
def test_regularization_is_seen_in_the_model_itself(trained: bool) -> None:
    def family(rate: float) -> mt.Family:
        batch = torch.randn(6, 4, 8), torch.randint(5, (6, 4))

        def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
            return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), label_smoothing=rate and 0.05)

        return mt.Family(lambda s: Regularized(s.width, rate).train(trained), batch, loss, Scale(16, 2))

    assert regularizers(family(0.1)) == {
        "blocks.*.dropout": 0.1, "drop": 0.3, "torch.nn.functional.dropout": 0.2,
        "torch.nn.functional.cross_entropy.label_smoothing": 0.05,
    }  # fmt: skip
    assert regularizers(family(0.0)) == {}
    assert regularizers(families.transformer()) == {}


def edited(tmp_path: Path, change: Any) -> Path:
    data = json.loads(json.dumps(config().as_dict()))
    change(data)
    path = tmp_path / "target.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data.update(format="mutransfer-target/9"), "mutransfer-target/9"),
        (lambda data: data.pop("seed"), "'seed' is missing"),
        (lambda data: data.update(sead=1), "did you mean 'seed'?"),
        (lambda data: data.update(steps="many"), "steps is 'many'"),
        (lambda data: data.update(options=[]), "options is []"),
        (lambda data: data["recipe"].update(lr=-1), "lr is -1"),
        (lambda data: data["scale"].update(width=0), "width is 0"),
        (lambda data: data["optimizer"].update(name="adamww"), "did you mean 'adamw'?"),
        (lambda data: data.update(parametrization="nup"), "did you mean 'mup'?"),
        (lambda data: data.update(parameters=["x"]), "damaged"),
        (lambda data: data["parameters"][0]["init"].update(kind="cauchy"), "damaged"),
        (lambda data: data.update(optimizer="adamw"), "damaged"),
        (lambda data: data.pop("tokens"), "is damaged (the key 'tokens' is missing): run `mutransfer transfer` again."),
        (
            lambda data: data.update(batch_size=True),
            "is damaged (batch_size is True: it should be a valid integer): run",
        ),
        (lambda data: data.update(clip=2.0), "clip contradicts"),
        (lambda data: data["schedule"].update(steps=7), "schedule contradicts"),
        (lambda data: data["recipe"].update(lr=1.0), "lr of embedding.weight is"),
    ],
)
def test_a_damaged_or_contradictory_file_is_refused(tmp_path: Path, change: Any, expected: str) -> None:
    assert expected in refusal(edited(tmp_path, change))


def test_a_proxys_result_is_not_a_target(tmp_path: Path) -> None:
    assert "holds a recipe" in refusal(Recipe().save(tmp_path / "best.json"))
    assert "mutransfer-plan/1" in refusal(plan().save(tmp_path / "plan.json"))
    refusal(tmp_path / "missing.json")
    (tmp_path / "cut.json").write_text('{"format": "mutr')
    refusal(tmp_path / "cut.json")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"proxy_steps": 0}, "proxy_steps is 0"),
        ({"provenance": {"a": {1}}}, "provenance"),
        ({"model": ""}, "model is ''"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        config(**changes)


RECIPE = Recipe(lr=2**-7)
SUBJECT = {"model": "model.py:build", "options": {}, "parametrization": "mup", "optimizer": "adamw"}
VERIFY = "mutransfer verify "


def evidence(folder: RunFolder, recipe: Recipe = RECIPE, **changes: Any) -> list[str]:
    return list(of_evidence(folder, recipe, {**SUBJECT, **changes}, [16, 32]))


def proven(folder: RunFolder) -> RunFolder:
    """A folder in which both commands have ended with "pass"."""
    question = {**SUBJECT, "recipe": RECIPE.model_dump(mode="json")}
    for command, path, asked in (
        ("verify", folder.verify, {"--widths": "16,64", "--seeds": 3}),
        ("check", folder.check, {"--widths": "16,32"}),
    ):
        folder.note_progress(command, planned=60, ended=True, arguments=asked, question=question)
        write_json(path, {"verdict": "pass", "cause": None})
    return folder


def test_what_nobody_verified_is_said_with_the_command(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a run")
    folder.make()
    verify, check = evidence(folder)
    assert "never verified" in verify
    assert f"`{VERIFY}'{folder.path}'`" in verify
    assert "never checked" in check
    assert f"--out '{folder.path}' --widths 16,32 --parametrization mup --optimizer adamw`" in check
    assert evidence(proven(folder)) == []


def test_a_model_file_is_the_same_however_its_path_is_written(tmp_path: Path) -> None:
    folder = proven(RunFolder(tmp_path).make())
    assert evidence(folder, model=str(Path("model.py").absolute()) + ":build") == []
    (verify, check) = evidence(folder, model="other.py:build")
    assert "for another model" in verify
    assert "for another model" in check


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("verify", {"verdict": "fail", "reasons": ["the optimum moved.", "it costs."]}, "failed (the optimum moved): "),
        ("verify", {"verdict": "undecided", "reasons": ["add seeds."]}, "verify {run} --widths 16,64 --seeds 6`"),
        ("verify", {"verdict": "pass", "transferred_log2_lr": -6.0}, "for another recipe"),
        ("verify", {}, "never verified"),
        ("check", {"verdict": "fail", "cause": "hidden lr."}, "checked and failed (hidden lr): "),
        ("check", {"verdict": "undecided", "cause": None}, "checked without a decision: "),
    ],
)
def test_a_verdict_that_proves_nothing_is_said(name: str, content: Any, said: str, tmp_path: Path) -> None:
    folder = proven(RunFolder(tmp_path).make())
    write_json(tmp_path / f"{name}.json", content)
    (warning,) = evidence(folder)
    assert said.format(run=tmp_path) in warning


@pytest.mark.parametrize("change", [{"parametrization": "sp"}, {"optimizer": "lion"}, {"options": {"head_dim": 8}}])
def test_a_verdict_about_something_else_is_said(change: dict[str, Any], tmp_path: Path) -> None:
    warnings = evidence(proven(RunFolder(tmp_path).make()), **change)
    assert [f"for another {next(iter(change))} than" in warning for warning in warnings] == [True, True]
    (verify,) = evidence(proven(RunFolder(tmp_path).make()), RECIPE.with_(alpha_output=2.0))
    assert "for another recipe" in verify
    assert f"`{VERIFY}{tmp_path}`" in verify  # its widths were the other question's


@pytest.mark.parametrize("command", ["verify", "check", "tune", "repeats"])
def test_what_was_left_unfinished_is_said(command: str, tmp_path: Path) -> None:
    folder = proven(RunFolder(tmp_path).make())
    folder.note_progress(command, **{"planned": 60, **folder.progress(command), "ended": False})
    (warning,) = evidence(folder)
    search = command in ("tune", "repeats")
    assert ("search is not finished" if search else "only partly") in warning
    assert f"`{folder.command('tune' if search else command)}`" in warning
    assert folder.command("verify") == f"mutransfer verify {tmp_path} --widths 16,64 --seeds 3"


def test_a_folder_of_an_earlier_version_is_judged_by_what_it_tells(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).make()
    write_json(folder.environment, {"basins": {"recipe": RECIPE.model_dump(mode="json"), "step": 1.0}})
    write_json(folder.verify, {"verdict": "pass", "transferred_log2_lr": -7.0})
    write_json(folder.check, {"verdict": "pass", "parametrization": "mup"})
    assert evidence(folder) == []
    assert len(evidence(folder, RECIPE.with_(lr=2**-6))) == 1
    assert len(evidence(folder, parametrization="sp")) == 1
