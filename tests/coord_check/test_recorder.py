"""The recorder in other people's loops: the frame of `record`, and a training that is not touched by a bit."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.coord_check import record, verdict
from mutransfer.schemas import COORDINATES

from ..helpers import families

KEY = ["module", "statistic", "step", "seed", "width"]


def by_hand(family: mt.Family, widths: list[int], seed: int, **options: Any) -> pd.DataFrame:
    frames = []
    for width in widths:
        plan = mt.plan(family, family.base.with_(width=width), recipe=mt.Recipe(lr=2**-6, weight_decay=1e-6))
        model = family.build(plan.scale)
        plan.initialize(model, seed)
        optimizer = torch.optim.AdamW(plan.param_groups(model), fused=True)
        with mt.Recorder(model, optimizer, lambda m: m(family.batch[0]), plan=plan, seed=seed, **options) as recorder:
            for _ in range(4):
                optimizer.zero_grad()
                family.loss(model, family.batch).backward()
                optimizer.step()
        frames.append(recorder.frame())
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize("kind", [families.mlp, families.transformer, lambda: families.transformer(tied=True)])
def test_a_recorder_gives_records_frame(kind: Any) -> None:
    family = kind()
    widths = [family.base.width, 2 * family.base.width]
    ours = by_hand(family, widths, 3, steps=(1, 2, 3, 4))
    theirs = record(family, widths, lr=2**-6, seeds=[3], steps=4)
    both = [each.sort_values(KEY).reset_index(drop=True) for each in (ours, theirs)]
    shared = both[0].merge(
        both[1], on=[*KEY, "role", "parametrization", "optimizer", "depth"], suffixes=("", "_theirs")
    )
    # `record` measures gradients, updates and weights at fewer steps.
    assert len(shared) == len(both[1]) - (both[1]["module"] == "(model)").sum()
    assert shared["value"].to_numpy() == pytest.approx(shared["value_theirs"].to_numpy(), rel=1e-5, abs=1e-9)


class Noisy(nn.Module):
    """Dropout and a batch norm: random numbers, and buffers that move."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def trained(recorded: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor, Any]:
    torch.manual_seed(5)
    model, x, y = Noisy(), torch.randn(32, 8), torch.randint(3, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = mt.Recorder(model, optimizer, lambda m: m(x), width=16)

    def loop() -> None:
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    if recorded:
        with recorder:
            loop()
    else:
        loop()
    return model.state_dict(), torch.rand(3), recorder


def test_the_training_is_not_touched_by_a_bit() -> None:
    (with_it, noise, recorder), (without, same_noise, _) = trained(True), trained(False)
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert torch.equal(noise, same_noise)
    frame = recorder.frame()
    assert set(frame["step"]) == {0, 1, 2, 4}  # powers of two
    assert (frame["width"] == 16).all()
    # Without a plan the last layer to run is the readout.
    roles = frame[frame["statistic"] == "activation"].set_index("module")["role"]
    assert roles.to_dict() == {"layers.0": "feature", "layers.1": "feature", "layers.3": "output"}


def test_dropout_is_no_change() -> None:
    """With the learning rate at zero nothing changes, whatever the masks."""
    torch.manual_seed(0)
    model, x = Noisy(), torch.randn(32, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with mt.Recorder(model, optimizer, lambda m: m(x), width=16) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
    frame = recorder.frame()
    assert (frame[frame["statistic"] == "change"]["value"] == 0).all()


def test_frames_of_several_widths_are_judged() -> None:
    family = families.mlp(width=64)
    frame = pd.concat([by_hand(family, [64, 128, 256, 512], seed) for seed in range(5)])
    assert verdict(frame).status == "pass"


def test_frames_without_a_plan_are_judged() -> None:
    """One learning rate and torch's own initial weights: the standard parametrization."""
    frames = []
    family = families.mlp(width=64)
    for width in (64, 128, 256, 512):
        for seed in range(5):
            torch.manual_seed(seed)
            model = family.build(mt.Scale(width, 3))
            optimizer = torch.optim.AdamW(model.parameters(), lr=2**-8)
            with mt.Recorder(model, optimizer, lambda m: m(family.batch[0]), width=width, seed=seed) as recorder:
                for _ in range(4):
                    optimizer.zero_grad()
                    family.loss(model, family.batch).backward()
                    optimizer.step()
            frames.append(recorder.frame())
    found = verdict(pd.concat(frames))
    assert found.status == "fail"
    assert "readout" in str(found.cause)


def test_what_a_recorder_cannot_know_it_asks_for() -> None:
    model = nn.Linear(4, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(mt.RequestError, match="pass plan=…, or width=…"):
        mt.Recorder(model, sgd, lambda m: m)
    with pytest.raises(mt.RequestError, match="not known whether 'rprop' steps like Adam or like SGD"):
        mt.Recorder(model, torch.optim.Rprop(model.parameters()), lambda m: m, width=4)
    recorder = mt.Recorder(model, sgd, lambda m: m, width=4)
    with recorder, pytest.raises(mt.RequestError, match="nothing was recorded"):
        recorder.frame()
    with mt.Recorder(model, sgd, lambda m: m(torch.ones(1, 4)), width=4, outputs=["head*"]):
        model(torch.ones(1, 4)).sum().backward()
        with pytest.raises(mt.RequestError, match=r"no module that ran matches head\*"):
            sgd.step()


def test_transformers_trainer(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from mutransfer.interop.transformers import RecorderCallback

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(32, (8, 12))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    path = tmp_path / "coordinates.parquet"
    callback = RecorderCallback(lambda m: m(input_ids=tokens[:2]), path, width=16, outputs=["lm_head"])
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    frame = COORDINATES.read(path)
    assert set(frame[frame["statistic"] == "change"]["step"]) == {1, 2}
    changes = frame[frame["statistic"].eq("change") & frame["step"].eq(2)].set_index("module")
    assert changes.loc["lm_head", "role"] == "output"
    assert (changes["value"] > 0).all()
    assert set(frame["optimizer"]) == {"adamw"}


# Lightning's own: torch deprecates what its data loaders use, and it has advice on the number of workers.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*does not have many workers:UserWarning")
def test_lightnings_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning's metrics believe a package list, in which mup has put a torchvision that may be broken: as if it were not there.
    listed = metadata.Distribution.from_name

    def without_torchvision(name: str) -> Any:
        if name == "torchvision":
            raise metadata.PackageNotFoundError(name)
        return listed(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", without_torchvision)
    from lightning.pytorch import LightningModule, Trainer

    from mutransfer.interop.lightning import RecorderCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    path = tmp_path / "coordinates.csv"
    callback = RecorderCallback(lambda m: m(x), path, model=lambda module: module.net, width=16)
    options: dict[str, Any] = {
        "max_steps": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    Trainer(
        accelerator="cpu", callbacks=[callback], enable_model_summary=False, default_root_dir=tmp_path, **options
    ).fit(Module(), data)
    frame = COORDINATES.read(path)
    assert set(frame[frame["statistic"] == "change"]["step"]) == {1, 2, 4}
    assert (frame[frame["statistic"] == "change"]["value"] > 0).all()
