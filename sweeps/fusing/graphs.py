"""A whole training step replayed from a CUDA graph: one launch in place of hundreds, which is what small models wait for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mutransfer.errors import describe

from .compiling import Step, distance

__all__ = ["Graph", "Graphed", "graphed"]

WARMUPS = 3  # libraries choose kernels and allocate workspaces in the first calls, which cannot be captured


class Graph(Protocol):
    """What records operations once and does them again, on the same memory."""

    def record(self, operations: Callable[[], None]) -> None:
        """Record ``operations``, which may be done a few times."""
        ...

    def replay(self) -> None:
        """Do again what was recorded."""
        ...


class CudaGraph:
    """`torch.cuda.CUDAGraph`, warmed up on a stream of its own as torch asks."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, operations: Callable[[], None]) -> None:
        """See `Graph.record`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                operations()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph):
            operations()

    def replay(self) -> None:
        """See `Graph.replay`."""
        self._graph.replay()


class Graphed:
    """A step on memory of its own: what it is given is copied there where it has changed, and its state is advanced there.

    The state it returns is that memory, so that nothing of it is copied as long as it is given back; who keeps it longer
    than to the next call, keeps a copy.

    Args:
        step: takes (`Moving`, ...) and returns (losses, `Moving`), pytrees of tensors; changes nothing in place.
        example: its arguments.
        graph: what records it.
    """

    def __init__(self, step: Step, example: tuple[Any, ...], graph: Graph) -> None:
        flat, self._spec = tree_flatten(example)
        self._memory: list[Tensor] = [each.detach().clone() for each in flat]
        self._seen: list[tuple[int, int]] = [(-1, -1)] * len(flat)
        self._held: list[Tensor | None] = [None] * len(flat)  # or another tensor could get the id in `_seen`
        self._states = len(tree_flatten(example[0])[0])
        inputs = tree_unflatten(self._memory, self._spec)
        self._now, self._losses = inputs[0], torch.empty(0)

        def operations() -> None:
            self._losses, after = step(*inputs)
            with torch.no_grad():
                tree_map(lambda into, each: into.copy_(each), self._now, after)

        self._graph = graph
        graph.record(operations)

    def __call__(self, *inputs: Any) -> Any:
        """Return the losses, and the state after the step."""
        flat, spec = tree_flatten(inputs)
        if spec != self._spec:
            raise ValueError("a captured step was given inputs of another structure")
        for index, (into, each) in enumerate(zip(self._memory, flat, strict=True)):
            seen = id(each), each._version
            if each is into:
                self._held[index] = None
            elif index < self._states or seen != self._seen[index]:
                into.copy_(each)
                self._seen[index], self._held[index] = seen, each
        self._graph.replay()
        return self._losses.clone(), self._now


def graphed(step: Step, example: tuple[Any, ...], tolerance: float) -> Step | None:
    """Return ``step`` replayed from a CUDA graph, or None with a warning that says why it cannot be.

    Args:
        step: as `Graphed` takes it.
        example: its arguments, on a GPU; done once both ways to be compared.
        tolerance: how far the replayed step may be from the other (`compiling.distance`).
    """
    try:
        replayed = Graphed(step, example, CudaGraph())
        far = distance(replayed(*example), step(*example))
        if not far < tolerance:
            raise ArithmeticError(f"its first step is {far:.1g} away from the same step launched one by one")
    except Exception as error:  # a synchronisation, an allocation, a library that cannot be captured
        warnings.warn(
            f"fused trials launch their operations one by one ({describe(error)}).", RuntimeWarning, stacklevel=2
        )
        return None
    return replayed
