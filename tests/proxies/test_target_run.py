"""The big run: interrupted, killed, out of disk and resumed, it ends with the weights of the run that nothing disturbed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.planning.audit import audit
from mutransfer.planning.target import TargetConfig, target_config
from mutransfer.proxies.data import load_data
from mutransfer.proxies.load import load_family
from mutransfer.proxies.target_run import run_target
from mutransfer.recipe import Scale

from ..helpers.sets import extended_but

BASE = Scale(16, 2)
DROPOUT = """
from torch import nn
def build(width, depth):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 10))
"""


def target(model: str = "mlp", data: str = "digits", steps: int = 25, seed: int = 4, **recipe: Any) -> TargetConfig:
    length = 1 if data == "digits" else 8
    source = load_data(data, length)
    settings = mt.Recipe.read({"lr": 2**-6, "weight_decay": 0.1, "clip": 1.0, **recipe}, "recipe")
    plan = mt.plan(load_family(model, source, BASE), BASE.with_(width=32), recipe=settings)
    return target_config(
        plan, model=model, options={}, data=data, sequence_length=length, proxy=BASE, proxy_batch_size=8,
        proxy_steps=steps, batch_size=8, steps=steps, tuned=["lr"], seed=seed, provenance={"data_sha256": source.sha256},
    )  # fmt: skip


def interrupting(at: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= at:
            raise error

    return progress


def state(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(RequestError) as caught:
        run_target(*args, **kwargs)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    config, seen = target(), []
    result = run_target(config, tmp_path / "run", checkpoint_every=10, progress=lambda *at: seen.append(at))
    assert list(result) == ["loss", "steps", "tokens_per_second", "checkpoint"]
    assert result["steps"] == 25
    assert result["loss"] < 2.3
    assert result["tokens_per_second"] > 0
    assert seen[-1] == (25, 25)
    assert {10, 20} <= {done for done, _ in seen}
    assert os.listdir(tmp_path / "run") == ["checkpoint.pt"]
    assert audit(config.plan, result["checkpoint"]).empty
    again = run_target(config, tmp_path / "run")
    assert again == {**result, "tokens_per_second": None}


@pytest.mark.parametrize(("model", "data"), [("mlp", "digits"), ("transformer", "markov"), ("dropout", "digits")])
@pytest.mark.parametrize("at", [1, 13])
def test_resumed_equals_uninterrupted_bit_by_bit(model: str, data: str, at: int, tmp_path: Path) -> None:
    if model == "dropout":
        (tmp_path / "model.py").write_text(DROPOUT)
        model = f"{tmp_path / 'model.py'}:build"
    config = target(model, data)
    whole = run_target(config, tmp_path / "whole", checkpoint_every=10)
    with pytest.raises(KeyboardInterrupt):
        run_target(config, tmp_path / "parts", checkpoint_every=7, progress=interrupting(at))
    assert at <= state(tmp_path / "parts")["step"] < 25
    torch.manual_seed(99)  # what another process would have there
    parts = run_target(config, tmp_path / "parts", checkpoint_every=7)
    assert parts["loss"] == whole["loss"]
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_the_comparison_would_notice_a_lost_moment(tmp_path: Path) -> None:
    """The same resume with the optimizer's second moments nudged: other weights."""
    config = target()
    run_target(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_target(config, tmp_path / "parts", progress=interrupting(10))
    saved = state(tmp_path / "parts")
    saved["optimizer"]["state"][0]["exp_avg_sq"] *= 1.001
    torch.save(saved, tmp_path / "parts" / "checkpoint.pt")
    run_target(config, tmp_path / "parts")
    assert not same(state(tmp_path / "parts")["model"], state(tmp_path / "whole")["model"])


SCRIPT = """
import sys
from pathlib import Path
from mutransfer.proxies.target_run import run_target
from mutransfer.planning.target import TargetConfig
import torch
torch.set_num_threads(1)
folder = Path(sys.argv[1])
print("up", flush=True)
progress = lambda done, total: print(done, flush=True)
run_target(TargetConfig.load(folder / "target.json"), folder, checkpoint_every=20, progress=progress)
"""


@pytest.mark.parametrize("number", extended_but([signal.SIGINT, signal.SIGKILL], signal.SIGKILL))
def test_a_real_process_is_really_stopped(number: signal.Signals, tmp_path: Path) -> None:
    config = target(steps=2000)
    config.save(tmp_path / "target.json")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdigit() and int(line) >= 60:
            break
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    stopped = state(tmp_path)["step"]
    assert 60 <= stopped < 2000
    assert number == signal.SIGINT or stopped % 20 == 0
    # The uninterrupted run, up to where this one is taken next.
    end = stopped + 15
    for out in (tmp_path, tmp_path / "whole"):
        with pytest.raises(KeyboardInterrupt):
            run_target(config, out, checkpoint_every=end, progress=interrupting(end))
    assert state(tmp_path)["step"] == end
    assert same(state(tmp_path), state(tmp_path / "whole"))


def test_ctrl_c_in_the_middle_of_a_step_saves_a_whole_one(tmp_path: Path) -> None:
    config, calls = target(), []

    def in_the_middle(*_: Any) -> None:  # weights are updated, the schedule and the step count are not yet
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_post_hook(in_the_middle)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_target(config, tmp_path / "parts")
    finally:
        hook.remove()
    assert state(tmp_path / "parts")["step"] == len(calls) < 25
    run_target(config, tmp_path / "parts")
    run_target(config, tmp_path / "whole")
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    calls = []

    def twice(*_: Any) -> None:
        calls.append(1)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_post_hook(twice)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_target(target(), tmp_path)
    finally:
        hook.remove()
    assert calls == [1]
    assert not os.listdir(tmp_path)


def test_the_handler_of_ctrl_c_is_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    raised: list[int] = []

    def ctrl_c(done: int, total: int) -> None:
        assert not raised, "the run went on after Ctrl-C"
        raised.append(done)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_target(target(), tmp_path, progress=ctrl_c)
    assert signal.getsignal(signal.SIGINT) is before
    assert state(tmp_path)["step"] == raised[0]


def test_another_targets_checkpoint_is_refused(tmp_path: Path) -> None:
    config = target(steps=10)
    run_target(config, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for other in (target(steps=11), target(steps=10, seed=5), target(steps=10, lr=2**-7)):
        assert "belongs to another target" in refusal(other, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    # What was warned about and who tuned it does not decide what is trained.
    run_target(replace(config, warnings=("new",), provenance={**config.provenance, "when": "later"}), tmp_path)
    assert run_target(target(steps=11), tmp_path, resume=False)["steps"] == 11


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    config, path = target(steps=10), tmp_path / "checkpoint.pt"
    run_target(config, tmp_path)
    good = path.read_bytes()
    for content in (good[:-100], b"", b"nonsense"):
        path.write_bytes(content)
        assert "cannot be read" in refusal(config, tmp_path)
    torch.save({"model": {}}, path)
    assert "is not a checkpoint of mutransfer" in refusal(config, tmp_path)
    path.write_bytes(good)
    damaged = state(tmp_path)
    damaged["model"]["more"] = torch.zeros(1)
    torch.save(damaged, path)
    assert "does not fit the model" in refusal(config, tmp_path)


def test_other_data_is_refused(tmp_path: Path) -> None:
    config = target()
    other = replace(config, provenance={"data_sha256": "f" * 64})
    assert "ffffffffffffffff…" in refusal(other, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
    run_target(replace(target(steps=2), provenance={}), tmp_path)


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    config = target()
    with pytest.raises(KeyboardInterrupt):
        run_target(config, tmp_path, progress=interrupting(5))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for eighths in range(1, 8):  # where it fills up decides whether torch, the buffer or the closing notices
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) * eighths // 8, hard))
        try:
            sentence = refusal(config, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f"no space left to write {tmp_path / 'checkpoint.pt'}" in sentence
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
        assert os.listdir(tmp_path) == ["checkpoint.pt"]
    run_target(config, tmp_path)


def test_a_failure_between_writing_and_replacing_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = target()
    with pytest.raises(KeyboardInterrupt):
        run_target(config, tmp_path, progress=interrupting(5))
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def crash(*_: Any) -> None:
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
        raise RuntimeError("power cut")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run_target(config, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_diverged_run_says_so_and_keeps_its_last_finite_checkpoint(tmp_path: Path) -> None:
    config = target(steps=200, lr=1e30, warmup=0.5)
    result = run_target(config, tmp_path / "none", checkpoint_every=100)
    assert result["loss"] is None
    assert result["steps"] < 200
    assert result["checkpoint"] is None
    often = run_target(config, tmp_path / "often", checkpoint_every=1)
    assert state(tmp_path / "often")["step"] == often["steps"] - 1  # the step that diverged is not kept
    assert run_target(config, tmp_path / "often") | {"tokens_per_second": 0} == often | {"tokens_per_second": 0}


@pytest.mark.parametrize(
    ("kwargs", "expected"), [({"checkpoint_every": 0}, "checkpoint_every is 0"), ({"device": "cuda"}, "sees no GPU")]
)
def test_a_wrong_argument_is_named(kwargs: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert expected in refusal(target(steps=2), Path("unused"), **kwargs)


def test_a_partial_file_of_a_killed_run_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.partial").write_bytes(b"half")
    begun = time.time()
    run_target(target(steps=3), tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").stat().st_mtime >= begun - 5
