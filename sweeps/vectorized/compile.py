"""Compile a whole training step: trace it to tensor operations, fold constants, and compile the result with Inductor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mutransfer._torch_internals import OpOverload, inductor_compile, is_mutable, tree_flatten, tree_map, tree_unflatten
from mutransfer.errors import describe

from .step import Moving

__all__ = ["CapturedGraph", "Graphed", "Step", "compiled", "distance", "graphed"]

Step = Callable[..., Any]
LARGEST = 2**22  # maximum number of entries of a folded constant


def compiled(step: Step, example: tuple[Any, ...], tolerance: float = 1e-3) -> Step | None:
    """Compile a step for inputs like ``example``; return None, with a warning that gives the reason, if that fails.

    Args:
        step: takes pytrees of tensors and returns (losses, `Moving`), changes nothing in place, and performs the same
            operations for all values.
        example: arguments of the step. The step is traced on them, and its compiled and uncompiled results are compared once.
        tolerance: maximum distance between the two results, in norm, relative to losses, parameters, buffers and states.
            Differences from reordered operations are far below it, those from wrong operations far above.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about its own code
            program, expected = _compile(step, example)
            far = distance(program(*example), expected)
        if not far < tolerance:
            raise ArithmeticError(f"its first step is {far:.1g} away from the uncompiled one")
    except Exception as error:  # any error of the compiler, or no compiler: the uncompiled step is used
        warnings.warn(f"fused trials run uncompiled ({describe(error)}).", RuntimeWarning, stacklevel=2)
        return None
    return program


def _compile(step: Step, example: tuple[Any, ...]) -> tuple[Step, Any]:
    flat, spec = tree_flatten(example)
    out_spec: list[Any] = []

    def flattened(*tensors: Tensor) -> list[Tensor]:
        out, found = tree_flatten(step(*tree_unflatten(tensors, spec)))
        out_spec.append(found)
        return out

    # Under vmap, only values shared by all models can be read as numbers (such as whether positions are consecutive), so they are
    # constants.
    graph = make_fx(flattened, _error_on_data_dependent_ops=False)(*flat)
    fold_constants(graph)
    expected = tree_unflatten(graph(*flat), out_spec[0])
    program = inductor_compile(graph, flat)

    def run(*inputs: Any) -> Any:
        return tree_unflatten(program(*tree_flatten(inputs)[0]), out_spec[0])

    return run, expected


def distance(found: tuple[Tensor, Moving], expected: tuple[Tensor, Moving]) -> float:
    """Return the largest relative distance of any part, in norm; entries may differ where Adam amplifies rounding to a step."""

    def parts(losses: Tensor, moving: Moving) -> list[list[Tensor]]:
        states = [[state[i] for state in moving.states.values() if len(state) > i] for i in range(2)]
        return [[losses], list(moving.trained.values()), list(moving.buffers.values()), *states]

    def norm(tensors: list[Tensor]) -> float:
        return math.sqrt(sum(float(each.double().nan_to_num(0, 0, 0).square().sum()) for each in tensors))

    worst = 0.0
    for ours, theirs in zip(parts(*found), parts(*expected), strict=True):
        gaps = [a.double() - b.double() for a, b in zip(ours, theirs, strict=True)]
        worst = max(worst, norm(gaps) / max(norm(theirs), 1e-30))
    return worst


@torch.no_grad()
def fold_constants(graph: fx.GraphModule) -> None:
    """Replace, in place, values that depend on no input, such as rotary tables and masks, by constants.

    This saves work in every step, and the compiled program then uses the same values as the uncompiled one: Inductor's float32
    cosine differs from torch's.
    """
    known: dict[fx.Node, Any] = {}
    nodes = graph.graph
    for node in list(nodes.nodes):
        if node.op == "get_attr":
            known[node] = getattr(graph, str(node.target))
        if node.op == "call_function" and _pure(node) and all(each in known for each in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    for number, (node, value) in enumerate(known.items()):
        needed = any(user not in known for user in node.users)
        if node.op == "get_attr" or not needed or not isinstance(value, Tensor) or value.numel() > LARGEST:
            continue
        name = f"_folded_{number}"
        graph.register_buffer(name, value.detach().clone())
        with nodes.inserting_before(node):
            node.replace_all_uses_with(nodes.get_attr(name))
    nodes.eliminate_dead_code()
    graph.recompile()


def _pure(node: fx.Node) -> bool:
    """Return whether a node can be a constant: it draws no random numbers, and it neither writes nor is written to."""
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    written = any(_writes(user) for user in node.users)
    return torch.Tag.nondeterministic_seeded not in target.tags and not is_mutable(target) and not written


def _writes(node: fx.Node) -> bool:
    return is_mutable(node.target)


WARMUPS = 3  # in the first calls, libraries choose kernels and allocate workspaces, which cannot be captured


class CapturedGraph(Protocol):
    """Protocol of an object that records operations once and replays them on the same memory."""

    def record(self, operations: Callable[[], None]) -> None:
        """Record ``operations``, which may be called several times."""
        ...

    def replay(self) -> None:
        """Replay the recorded operations."""
        ...


class CudaGraph:
    """`torch.cuda.CUDAGraph`, warmed up on a side stream as torch requires."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, operations: Callable[[], None]) -> None:
        """See `CapturedGraph.record`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                operations()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph):
            operations()

    def replay(self) -> None:
        """See `CapturedGraph.replay`."""
        self._graph.replay()


class Graphed:
    """A captured step with static memory: changed inputs are copied there, and the state is advanced in place.

    The returned state is that memory, so nothing is copied if it is passed to the next call. Clone it to keep it beyond the next
    call.

    Args:
        step: takes (`Moving`, ...) and returns (losses, `Moving`), pytrees of tensors; changes nothing in place.
        example: arguments of the step.
        graph: records and replays the step.
    """

    def __init__(self, step: Step, example: tuple[Any, ...], graph: CapturedGraph) -> None:
        flat, self._spec = tree_flatten(example)
        self._memory: list[Tensor] = [each.detach().clone() for each in flat]
        self._seen: list[tuple[int, int]] = [(-1, -1)] * len(flat)
        self._held: list[Tensor | None] = [None] * len(
            flat
        )  # keeps inputs alive: another tensor could otherwise get an id in `_seen`
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
    """Capture ``step`` as a CUDA graph; return None, with a warning that gives the reason, if that fails.

    Args:
        step: as for `Graphed`.
        example: arguments of the step, on a GPU; the replayed and the launched results are compared once.
        tolerance: maximum distance between the two results (`compile.distance`).
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
