"""Compile a whole training step: trace it to tensor operations, fold constants, and compile the result with Inductor."""

from __future__ import annotations

import contextlib
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mutransfer._torch_internals import (
    OpOverload,
    inductor_compile,
    is_mutable,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from mutransfer.devices import devices_of, is_out_of_memory, random_state_restored, seeded_generators
from mutransfer.errors import describe

from .step import Moving, TrainingStep

__all__ = ["CapturedGraph", "Graphed", "Step", "compiled", "distance", "graphed"]

Step = Callable[..., Any]
LARGEST = 2**22  # maximum number of entries of a folded constant


def compiled(step: Step, example: tuple[Any, ...], tolerance: float = 1e-3) -> Step | None:
    """Compile a step for inputs like ``example``; return None, with a warning that gives the reason, if that fails.

    The random number generators are left as they were.

    Args:
        step: takes pytrees of tensors and returns (losses, `Moving`), changes nothing in place, and performs the same
            operations for all values.
        example: arguments of the step. The step is traced on them, and its compiled and uncompiled results are compared once.
        tolerance: maximum distance between the two results, in norm, relative to losses, parameters, buffers and states.
            Differences from reordered operations are far below it, those from wrong operations far above.

    Raises:
        RuntimeError: there is not enough memory (`devices.is_out_of_memory`).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about its own code
            program, run_graph = _compile(step, example)
            # The same seed for both: random models, such as those with dropout, are comparable only with equal draws.
            found, expected = (_with_seed(each, example) for each in (program, run_graph))
        if not (far := distance(found, expected)) < tolerance:
            raise ArithmeticError(f"its first step is {far:.1g} away from the uncompiled one")
    except Exception as error:  # any error of the compiler, or no compiler: the uncompiled step is used
        if is_out_of_memory(error):
            raise
        warnings.warn(f"fused trials run uncompiled ({describe(error)}).", RuntimeWarning, stacklevel=2)
        return None
    return program


def _with_seed(step: Step, example: tuple[Any, ...]) -> Any:
    with seeded_generators(0, devices_of(tree_leaves(example))):
        return step(*example)


def _compile(step: Step, example: tuple[Any, ...]) -> tuple[Step, Step]:
    """Return the compiled step, and the traced step without compilation."""
    flat, spec = tree_flatten(example)
    out_spec: list[Any] = []

    def flattened(*tensors: Tensor) -> list[Tensor]:
        out, found = tree_flatten(step(*tree_unflatten(tensors, spec)))
        out_spec.append(found)
        return out

    # Under vmap, only values shared by all models can be read as numbers (such as whether positions are consecutive), so they are
    # constants.
    with seeded_generators(0, devices_of(flat)):
        graph = make_fx(flattened, _error_on_data_dependent_ops=False)(*flat)
    fold_constants(graph)

    def on_trees(program: Callable[..., Any]) -> Step:
        return lambda *inputs: tree_unflatten(program(*tree_flatten(inputs)[0]), out_spec[0])

    return on_trees(inductor_compile(graph, flat)), on_trees(graph)


def distance(found: tuple[Tensor, Moving], expected: tuple[Tensor, Moving]) -> float:
    """Return the largest relative distance of any part, in norm; entries may differ where Adam amplifies rounding to a step.

    It is infinite if one result is finite where the other is not, and if a part has no finite entry, which proves nothing.
    """

    def parts(losses: Tensor, moving: Moving) -> list[list[Tensor]]:
        states = [[state[i] for state in moving.states.values() if len(state) > i] for i in range(2)]
        return [[losses], list(moving.trained.values()), list(moving.buffers.values()), *states]

    def norm(tensors: list[Tensor]) -> float:
        return math.sqrt(sum(float(each.double().square().sum()) for each in tensors))

    worst = 0.0
    for ours, theirs in zip(parts(*found), parts(*expected), strict=True):
        finite = [each.isfinite() for each in theirs]
        if any(not torch.equal(a.isfinite(), kept) for a, kept in zip(ours, finite, strict=True)):
            return math.inf
        if theirs and not any(bool(kept.any()) for kept in finite):
            return math.inf
        a, b = ([each[kept].double() for each, kept in zip(part, finite, strict=True)] for part in (ours, theirs))
        gaps = [one - other for one, other in zip(a, b, strict=True)]
        worst = max(worst, norm(gaps) / max(norm(b), 1e-30))
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
    if target is operator.getitem:  # one of several results
        return True
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
    """`torch.cuda.CUDAGraph`, warmed up on a side stream as torch requires.

    A capture that fails leaves the caller's stream current, although `torch.cuda.graph` does not.
    """

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, operations: Callable[[], None]) -> None:
        """See `CapturedGraph.record`."""
        before = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    operations()
            before.wait_stream(stream)
            with torch.cuda.graph(self._graph):
                operations()
        except BaseException:
            torch.cuda.set_stream(before)
            with contextlib.suppress(Exception):  # what failed is raised already
                torch.cuda.synchronize()
            raise

    def replay(self) -> None:
        """See `CapturedGraph.replay`."""
        self._graph.replay()


class Graphed:
    """A captured step with static memory: changed inputs are copied there, and the state is advanced in place.

    The returned state is that memory, so nothing is copied if it is passed to the next call. Clone it to keep it beyond the next
    call.

    Args:
        step: takes (`Moving`, ...) and returns (losses, `Moving`), pytrees of tensors; changes nothing in place, or writes the
            new state to the one that it is given.
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
                tree_map(lambda into, each: into if each is into else into.copy_(each), self._now, after)

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


def graphed(step: Step, example: tuple[Any, ...], tolerance: float, graph: CapturedGraph | None = None) -> Step | None:
    """Capture ``step`` as a CUDA graph; return None, with a warning that gives the reason, if that fails.

    A failed capture leaves no trace: the current stream and the random number generators are as before.

    Args:
        step: as for `Graphed`.
        example: arguments of the step, on a GPU; the replayed and the launched results are compared once.
        tolerance: maximum distance between the two results (`distance`).
        graph: records and replays the step; by default a CUDA graph.

    Raises:
        RuntimeError: there is not enough memory (`devices.is_out_of_memory`).
    """
    try:
        with random_state_restored(devices_of(tree_leaves(example))):
            writing = step.writing() if isinstance(step, TrainingStep) else step
            replayed = Graphed(writing, example, graph or CudaGraph())
            found, expected = (_with_seed(each, example) for each in (replayed, step))  # equal draws, as in `compiled`
        if not (far := distance(found, expected)) < tolerance:
            raise ArithmeticError(f"its first step is {far:.1g} away from the same step launched one by one")
    except Exception as error:  # a synchronisation, an allocation, a library that cannot be captured
        if is_out_of_memory(error):
            raise
        warnings.warn(
            f"fused trials launch their operations one by one ({describe(error)}).", RuntimeWarning, stacklevel=2
        )
        return None
    return replayed
