"""What fused trainings are compared with: the same trainings one by one, in float64, with settings that all differ."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mutransfer as mt
from mutransfer.param_names import plain_name
from mutransfer.planning.build import plan
from mutransfer.proxies.data.base import Data
from mutransfer.proxies.load import load_family
from mutransfer.proxies.training import Training
from mutransfer.sweeps.vectorized.batch_training import Slot, VectorizedTraining

from . import families
from .blobs import blobs

STEPS, BATCH = 20, 4
LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64,
}  # fmt: skip


def data_for(name: str) -> Data:
    kind: Any = "tokens" if name in ("transformer", "grouped", "llama", "gpt2", "t5", "mamba") else "images"
    return blobs(kind, noise=1, held_out=8)


class Normed(torch.nn.Module):
    """Batch norm, whose running averages training moves, and a parameter that the loss does not use.

    No bias before the norm: its gradient is rounding alone, of which Adam makes a step of full size.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.norm = torch.nn.Linear(64, width, bias=False), torch.nn.BatchNorm1d(width)
        self.readout, self.spare = torch.nn.Linear(width, 10), torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.input(x.flatten(1)))
        if isinstance(self.spare.weight, torch._subclasses.fake_tensor.FakeTensor):
            h = h + 0 * self.spare(h)  # seen when it is planned, not used when it is trained
        return self.readout(torch.relu(h))


class Skip(torch.nn.Module):
    """The picture once more beside the features, so that some columns of a layer grow and some do not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.mid, self.readout = (
            torch.nn.Linear(*each) for each in ((64, width), (64 + width, width), (width, 10))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.readout(torch.relu(self.mid(torch.cat([x, torch.relu(self.input(x))], 1))))


@functools.cache
def family(name: str) -> mt.Family:
    """A family by name; the built-ins as other tests have them."""
    match name:
        case "mlp":
            return families.mlp(width=16)
        case "transformer":
            return families.transformer(width=16, head_dim=8, tied=True)
        case "grouped":
            return families.transformer(width=32, head_dim=8, kv_share=2, qk_norm=True)
        case "resnet":
            return families.resnet(width=8)
        case "normed":
            return mt.Family(lambda s: Normed(s.width), families.image_batch(), families.loss, mt.Scale(16), "normed")
        case "skip":
            return mt.Family(lambda s: Skip(s.width), families.image_batch(), families.loss, mt.Scale(16), "skip")
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    return load_family(f"hf:{folder}/config.json", data_for(name), None)


# No two alike in anything that a trial may have for itself.
OWN: list[dict[str, Any]] = [
    {"lr": 2**-6, "schedule": "cosine", "warmup": 0.2, "init_scale": 1.0, "eps": 1e-8, "betas": (0.9, 0.95), "clip": None},
    {"lr": 2**-5, "schedule": "linear", "warmup": 0.0, "init_scale": 0.5, "eps": 1e-6, "betas": (0.8, 0.99), "clip": 0.3},
    {"lr": 2**-8, "schedule": "wsd", "warmup": 0.1, "init_scale": 1.3, "eps": 1e-5, "betas": (0.0, 0.9), "clip": 0.05,
     "final": 0.1},
    {"lr": 2**-7, "schedule": "constant", "warmup": 0.5, "alpha_output": 2.0, "alpha_input": 0.5, "eps": 1e-7, "clip": 1e9},
    {"lr": 2**-4, "schedule": "cosine", "warmup": 0.05, "alpha_output": 0.3, "clip": 2.0, "momentum": 0.0, "decay": "all"},
]  # fmt: skip


PRUNED: list[Any] = [{"name": "pruned", "density": density, "score": "erk"} for density in (0.5, 1.0, 0.25, 0.1, 0.6)]


def plans(name: str, optimizer: str = "adamw", *, pruned: bool = False) -> list[mt.Plan]:
    base = family(name)
    found = []
    for k, own in enumerate(OWN):
        decay = 0.0 if optimizer == "adam" else 0.02 * k
        lr = own["lr"] * (4 if optimizer == "sgd" else 1)
        recipe = mt.Recipe.read({"momentum": 0.5 + 0.1 * k, "weight_decay": decay, **own, "lr": lr}, "recipe")
        recipe = recipe.with_(method=PRUNED[k]) if pruned else recipe
        found.append(plan(base, base.base.with_(width=2 * base.base.width), "mup", optimizer, recipe))
    return found


def apart(name: str, plan: mt.Plan, seed: int, steps: int = STEPS) -> tuple[Training, float]:
    """The training by itself after ``steps`` of `STEPS`, and its validation loss."""
    training = Training(family(name), plan, data_for(name), steps=STEPS, batch_size=BATCH, seed=seed)
    training.advance(steps)
    return training, training.validate()


def together(name: str, slots: Sequence[Slot], **options: Any) -> VectorizedTraining:
    return VectorizedTraining(family(name), slots, data_for(name), steps=STEPS, batch_size=BATCH, **options)


def distance(training: Training, fused: VectorizedTraining, index: int) -> float:
    """The largest difference of any parameter or buffer, relative to that tensor's largest entry."""
    own = {**dict(training.model.named_parameters()), **dict(training.model.named_buffers())}
    # Fused models have no masks: their gradients are masked.
    own = {plain_name(name): each for name, each in own.items() if not name.endswith(".mask")}
    ours = fused.stack.tensors()
    shared = dict(fused.stack.model.named_buffers())
    gaps = []
    for name, theirs in own.items():
        mine = ours[name][index] if name in ours else shared[name]
        gaps.append(float((mine - theirs.detach()).abs().max() / theirs.detach().abs().max().clamp(min=1e-30)))
    return max(gaps)
