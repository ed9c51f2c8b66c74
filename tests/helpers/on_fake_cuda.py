"""Run on the fake GPU, in a process of its own, and print JSON: ``python -m tests.helpers.on_fake_cuda LIBRARY GROUP``."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import fake_cuda

MODELS = ("mlp", "resnet", "transformer", "llama")  # a model's name is also the group of its fused steps
Case = tuple[str, Callable[[], Any]]


def experiment(model: str, optimizer: str, **changes: Any) -> Any:
    """A small experiment; "llama" is transformers'."""
    from mutransfer.sweeps.experiment import Experiment

    from .apart import LLAMA

    if model == "llama":
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
        model, changes = f"hf:{folder}/config.json", {"data": "markov", "base": None, **changes}
    size = {"width": 32, "depth": 2}
    text = model == "transformer" or model.startswith("hf:")
    asked = {
        "model": model, "data": "bytes" if text else "digits", "sequence_length": 16, "proxy": size, "base": size,
        "batch_size": 2, "steps": 20, "optimizer": optimizer, "recipe": {"lr": 2**-6, "clip": 1.0}, **changes,
    }  # fmt: skip
    return Experiment.read({key: value for key, value in asked.items() if value is not None}, "test")


def planned(asked: Any) -> tuple[Any, Any]:
    """Return the experiment's context and plan, made on the CPU as usual."""
    from mutransfer.sweeps.jobs import RunContext

    context = RunContext(asked)
    plan = context.plan(asked.proxy_scale, "mup", asked.recipe)
    context.required_data.validation()
    return context, plan


def fused(model: str, optimizer: str, bfloat16: bool = False, clip: bool = True) -> dict[str, int]:
    """Take one fused step, keep two of three trainings and save them; return the kernels launched by the step."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mutransfer.sweeps.vectorized.batch_training import Slot, VectorizedTraining

    context, plan = planned(experiment(model, optimizer, recipe={"lr": 2**-6, "clip": 1.0 if clip else None}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        training = VectorizedTraining(
            context.family, [Slot(plan, k) for k in range(3)], context.required_data, steps=20, batch_size=2, clips=clip,
            precision="bfloat16" if bfloat16 else "float32", device="cuda",
        )  # fmt: skip
        training.stack.model.train()
        for _ in range(2):
            inputs = training.inputs()
            with fake_cuda.only_on_the_device() as launched:
                losses, training.now = training.step(*inputs)
            count = dict(launched)
            assert losses.device.type == "cuda"
        training.stack.trained, training.stack.buffers = training.now.trained, training.now.buffers
        training.keep([2, 0])
        for each in training.stack.tensors().values():
            assert each.device.type == "cuda", each.device
        copies = Counted("cuda", "cpu")
        with copies:
            snapshots = training.snapshots([0, 1])
        stacks = len(training.stack.trained) + len(training.stack.resting) + len(training.stack.buffers)
        stacks += sum(len(state) for state in training.now.states.values())
        assert copies.number == stacks, (copies.number, stacks)
        training.begin(1, Slot(plan, 5), snapshots[0])
    return count


def uploads() -> int:
    """Return the number of copies to the GPU for eight steps of three trainings with one seed."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from mutransfer.sweeps.vectorized.batch_training import Slot, VectorizedTraining

    context, plan = planned(experiment("mlp", "adamw"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        training = VectorizedTraining(
            context.family,
            [Slot(plan, 0) for _ in range(3)],
            context.required_data,
            steps=20,
            batch_size=2,
            device="cuda",
        )
        FakeTensor.tolist = zeros  # type: ignore[method-assign]
        training._graphs = False  # no capture here
        copies = Counted("cpu", "cuda")
        with copies:
            training.advance(8)
    return copies.number


def zeros(tensor: Any) -> Any:
    """What is read instead of the values of a fake tensor."""
    return 0.0 if not tensor.dim() else [zeros(each) for each in tensor.unbind()]


class Counted:
    """Context that counts the copies of tensors from one device to another."""

    def __new__(cls, source: str, to: str) -> Any:
        """Return the mode; torch is imported only here."""
        from torch import Tensor
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        class Mode(TorchDispatchMode):
            number = 0

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                if func._schema.name in ("aten::_to_copy", "aten::copy_"):
                    tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
                    self.number += tensors[-1].device.type == source and out.device.type == to
                return out

        return Mode()


def separate(model: str, optimizer: str) -> dict[str, int]:
    """Take three steps of a `Training`, save and restore it; return the kernels launched by the last step."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mutransfer.devices import uploaded
    from mutransfer.proxies.training import Training

    context, plan = planned(experiment(model, optimizer))
    with FakeTensorMode(allow_non_fake_inputs=True):
        training = Training(context.family, plan, context.required_data, steps=20, batch_size=2, device="cuda")
        training.model.train()
        for step in range(3):
            batch = uploaded(context.required_data.batch(step, 2, 0), "cuda")
            with fake_cuda.only_on_the_device() as launched:
                training.train_on(batch)
        if optimizer in ("adamw", "sgd", "muon"):
            again = Training(context.family, plan, context.required_data, steps=20, batch_size=2, device="cuda")
            again.load_state_dict(training.state_dict())
            training = again
        parts = [part for state in training.optimizer.state.values() for part in state.values()]
        states = [part for part in parts if isinstance(part, torch.Tensor) and part.dim()]
        for tensor in [*training.model.parameters(), *training.model.buffers(), *states]:
            assert tensor.device.type == "cuda", tensor.device
    return dict(launched)


def checked(model: str, seeds: int) -> int:
    """Record the coordinates of a model at two widths; return the number of rows.

    The passes that are measured stay on the device. What is read between them, to name parameters that no step has moved, waits.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from mutransfer.coord_check import recording
    from mutransfer.coord_check.stacked import StackedModels

    context, _ = planned(experiment(model, "adamw"))
    run, forward, backward = recording.run, StackedModels.forward, StackedModels.backward

    def on_fake_tensors(*given: Any, **options: Any) -> Any:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield from list(run(*given, **options))

    def on_the_device(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **options: Any) -> Any:
            with fake_cuda.only_on_the_device():
                return function(*given, **options)

        return watched

    recording.run = on_fake_tensors
    StackedModels.forward, StackedModels.backward = on_the_device(forward), on_the_device(backward)  # type: ignore[method-assign]
    FakeTensor.__bool__ = lambda tensor: False  # type: ignore[attr-defined]
    FakeTensor.tolist = zeros  # type: ignore[method-assign]
    try:
        return len(recording.record(context.family, [32, 64], seeds=range(seeds), steps=2, device="cuda"))
    finally:
        recording.run, StackedModels.forward, StackedModels.backward = run, forward, backward  # type: ignore[method-assign]


def faulty(fault: str) -> dict[str, int]:
    """Take a fused step of a model with a planted fault."""
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    import mutransfer as mt
    from mutransfer.planning.build import plan
    from mutransfer.sweeps.vectorized.batch_training import Slot, VectorizedTraining

    from . import families
    from .blobs import blobs

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.input, self.readout = nn.Linear(64, width), nn.Linear(width, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.input(x.flatten(1)))
            if x.device.type == "cuda":
                match fault:
                    case "arange":
                        h = h[:, torch.arange(h.shape[1])]
                    case "list":
                        h = h[:, torch.tensor([*range(h.shape[1])])]
                    case "item":
                        torch.ones(2, device=x.device).sum().item()
                    case "cpu":
                        h = h * torch.ones(2, device=x.device).cpu().sum().to(x.device)
            return self.readout(h)

    family = mt.Family(lambda s: Net(s.width), families.image_batch(), families.loss, mt.Scale(16), "faulty")
    settings = plan(family, mt.Scale(32), "mup", "adamw", mt.Recipe(lr=2**-6))
    with FakeTensorMode(allow_non_fake_inputs=True):
        data = blobs("images", noise=1, held_out=8)
        training = VectorizedTraining(
            family, [Slot(settings, 0), Slot(settings, 1)], data, steps=20, batch_size=2, device="cuda"
        )
        inputs = training.inputs()
        with fake_cuda.only_on_the_device() as launched:
            training.step(*inputs)
    return dict(launched)


def cases(group: str) -> Iterator[Case]:
    """Yield the cases of a group, by name."""
    from mutransfer.optimizers.rules import OPTIMIZERS
    from mutransfer.sweeps.vectorized.updates import FUSED

    match group:
        case "uploads":
            yield "uploads", uploads
        case "separate":
            for optimizer in OPTIMIZERS:
                yield optimizer, lambda o=optimizer: separate("mlp", o)
            for model in MODELS[1:]:
                yield f"{model} adamw", lambda m=model: separate(m, "adamw")
        case "check":
            for model, seeds in (("mlp", 1), *((each, 2) for each in MODELS)):
                yield f"{model}, {seeds} seeds", lambda m=model, n=seeds: checked(m, n)
        case "faulty":
            for fault in ("none", "arange", "list", "item", "cpu"):
                yield fault, lambda f=fault: faulty(f)
        case model:
            for optimizer in FUSED:
                yield optimizer, lambda o=optimizer: fused(model, o)
            yield "bfloat16", lambda: fused(model, "adamw", bfloat16=True)
            yield "without clipping", lambda: fused(model, "adamw", clip=False)


def main(library: str, group: str) -> None:
    """Run a group and print its results."""
    fake_cuda.install(Path(library))
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    if group in (
        "llama",
        "separate",
        "check",
    ):  # imports transformers, which is not whole if that happens while tensors are fake
        planned(experiment("llama", "adamw"))
    results = {}
    for name, run in cases(group):
        try:
            results[name] = run()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(name, traceback.format_exc(), file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
