"""What is known of a family before a target is chosen: one `ParamSpec` per parameter, and its attention.

`match_layers` returns which layer of the base model a layer of a deeper one is scaled from: matched by pattern, not by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import LayerError
from ..initialization import Init
from .columns import Columns
from .dataflow import Attention
from .growing_products import Contraction, Heads

__all__ = ["Observation", "ParamSpec", "fits", "kinds", "match_layers"]

Tree = dict[str, Any]  # part of a name → subtree; at a leaf, under "", (full name, number of axes)


Fits = Callable[[str, str], bool]


def match_layers(
    target: Mapping[str, int], base: Mapping[str, int], fits: Fits | None = None, kinds: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return for every parameter of the target the parameter of the base that it is scaled from.

    Layers are the numbered parts of a name. A layer is matched to the base's layer of the same number if they look alike (the
    same parameters within them, with the same number of axes); otherwise to the one it would be if the base's stack were
    continued periodically; otherwise to the last one that looks alike. If one list also holds the input and the readout, these
    are recognized by their ``kinds`` and matched from either end; the layers between them are the ones that are repeated.

    Args:
        target: name → number of axes.
        base: name → number of axes.
        fits: returns whether a parameter of the target can be one of the base at another width.
        kinds: name in the base → what two layers of one kind have in common, such as their shapes and growing axes.

    Raises:
        LayerError: a parameter on one side has no counterpart on the other.
    """
    if target.keys() == base.keys():
        return {name: name for name in target}
    found = dict(_matched(_tree(target), _tree(base), fits or (lambda *_: True), kinds or {}))
    missing = sorted(set(base) - set(found.values()))
    if missing:
        raise LayerError(f"{missing[0]} is in the base but has no counterpart in the target: build the same modules.")
    return {name: found[name] for name in target}


def _tree(names: Mapping[str, int]) -> Tree:
    root: Tree = {}
    for name, axes in names.items():
        node = root
        for part in name.split("."):
            node = node.setdefault(part, {})
        node[""] = (name, axes)
    return root


def _matched(target: Tree, base: Tree, fits: Fits, kinds: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    looks = {key: _looks(value) for key, value in base.items() if key.isdigit()}
    aligned = _aligned(target, base, fits, kinds) if kinds else {}
    for key, value in target.items():
        if key == "" and "" in base:
            yield value[0], base[""][0]
        elif key.isdigit() and looks:
            layer = aligned.get(key) or _layer(int(key), _looks(value), looks, value)
            yield from _matched(value, base[layer], fits, kinds)
        elif key != "" and key in base:
            yield from _matched(value, base[key], fits, kinds)
        else:
            raise _unmatched(target if key == "" else value)


def _layer(number: int, look: frozenset[Any], looks: dict[str, frozenset[Any]], value: Tree) -> str:
    alike = [key for key, other in looks.items() if other == look]
    if not alike:
        raise _unmatched(value)
    periodic = str(number % len(looks))
    return next((key for key in (str(number), periodic) if key in alike), alike[-1])


def _aligned(target: Tree, base: Tree, fits: Fits, kinds: Mapping[str, Any]) -> dict[str, str]:
    """Match a list in which some layers only look alike and of which the target repeats a part more often.

    Of several possible parts, one that the base itself repeats is chosen, otherwise the one that grows the most.
    """
    wide, narrow = (sorted((key for key in tree if key.isdigit()), key=int) for tree in (target, base))
    kind = {key: tuple((path, kinds[name]) for name, path, _ in _leaves(base[key])) for key in narrow}
    alike: dict[Any, set[Any]] = {}
    for key in narrow:
        alike.setdefault(_looks(base[key]), set()).add(kind[key])
    more = len(wide) - len(narrow)
    if more <= 0 or all(len(found) == 1 for found in alike.values()):
        return {}
    found: list[tuple[tuple[bool, float], list[str]]] = []
    for size in (size for size in range(1, len(narrow) + 1) if more % size == 0):
        for end in range(size, len(narrow) + 1):
            part, before = narrow[end - size : end], narrow[max(0, end - 2 * size) : end - size]
            row = [*narrow[:end], *part * (more // size), *narrow[end:]]
            if all(_could_be(target[a], base[b], fits) for a, b in zip(wide, row, strict=True)):
                repeated = [kind[key] for key in part] == [kind[key] for key in before]
                grows = sum(sum(grown) for key in part for _, (_, grown) in kind[key]) / size
                found.append(((repeated, grows), row))
    return dict(zip(wide, max(found, key=lambda each: each[0])[1], strict=True)) if found else {}


def _could_be(target: Tree, base: Tree, fits: Fits) -> bool:
    ours, theirs = (list(_leaves(each)) for each in (target, base))
    return _looks(target) == _looks(base) and all(fits(a[0], b[0]) for a, b in zip(ours, theirs, strict=True))


def _unmatched(tree: Tree) -> LayerError:
    name = next(iter(_leaves(tree)))[0]
    return LayerError(
        f"{name} is in the target, but nothing in the base looks like it: use a base depth with every kind of layer."
    )


def _looks(tree: Tree) -> frozenset[Any]:
    """Return what a layer consists of, regardless of its own number and those within it."""
    return frozenset((tuple("#" if part.isdigit() else part for part in path), axes) for _, path, axes in _leaves(tree))


def _leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterable[tuple[str, tuple[str, ...], int]]:
    for key, value in tree.items():
        if key == "":
            yield value[0], path, value[1]
        else:
            yield from _leaves(value, (*path, key))


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the base model.

    Parameters carry a factor into a tensor if multiplying all of them by c multiplies the tensor by c.

    Args:
        name: as in ``named_parameters``.
        shape: at base size.
        role: input, vector, hidden, output, bottleneck or finite.
        axes: what happens to each axis (in, out, gather, each).
        grows: which axes grow with the width.
        init: the initialization of its entries.
        tied: whether it is also the readout.
        carriers: for a tied readout, the parameters that carry a factor into its input (those of the final norm).
        shared_carriers: the carriers whose result is also used by something other than the readout.
        on_data: whether the data enters the model here.
        meets: the parameters that carry a factor into what this parameter is applied to, in any of its uses.
        inside: whether it is used on a residual branch.
        ends_branch: whether it carries a factor into the end of a residual branch.
        shift: s for a gain used as s + w, otherwise 0.
        constant: power of the width in the number by which the forward pass itself multiplies this parameter.
        constant_inside: whether the module that owns the parameter multiplies by that number.
        readout_constant: the same for a tied matrix whose result is used as a readout.
        depth_constant: power of the depth in such a number, where depths have been compared.
        sizes: for the magnitudes of a normalized weight (weight_norm's g), the name of the weight's own parameter.
        mixed: whether its rows have different roles (a fused matrix in which some rows grow and some do not).
        layer: the parts of the name up to the layer number, in a stack that depth makes longer; empty outside of such stacks.
        rounds: (a, b) if a model of depth D has a + b·D residual branches with this very parameter: (1, 0) if it has one
            regardless of depth, (0, 1) if every layer uses it or depths have not been compared.
        turned: whether one use sums over the axis that another use keeps (x @ w and x @ w.T).
        columns: for a summed axis made of growing and fixed pieces, which entries are which (`columns`).
        insisted: whether the role was given rather than observed.
        unsplittable: why the input of a layer with such columns cannot be multiplied column by column; empty if it can.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    axes: tuple[str, ...]
    grows: tuple[bool, ...]
    init: Init
    tied: bool
    carriers: frozenset[str]
    on_data: bool
    meets: frozenset[str] = frozenset()
    inside: bool = False
    ends_branch: bool = False
    shift: float = 0.0
    constant: float = 0.0
    constant_inside: bool = False
    readout_constant: float = 0.0
    depth_constant: float = 0.0
    shared_carriers: frozenset[str] = frozenset()
    mixed: bool = False
    sizes: str = ""
    turned: bool = False
    columns: tuple[Columns, ...] = ()
    insisted: bool = False
    unsplittable: str = ""
    layer: tuple[str, ...] = ()
    rounds: tuple[float, float] = (0.0, 1.0)

    def multipliers(
        self, shape: tuple[int, ...], name: str | None = None, deeper: float = 1.0, *, apart: bool = False
    ) -> tuple[float, float]:
        """Return (m_in, m_out) of this parameter at another ``shape``; every axis counts with its own ratio.

        An axis that does not grow with the width may be the layers themselves, and may then be ``deeper`` times as long. Of
        mixed columns, all are counted, or with ``apart`` only those that grow.

        Raises:
            LayerError: another axis differs.
        """
        name = name or self.name
        if len(shape) != len(self.shape):
            raise LayerError(f"{name} has shape {list(shape)} in the target and {list(self.shape)} in the base.")
        m_in = m_out = 1.0
        for axis, (label, grows, size, base) in enumerate(zip(self.axes, self.grows, shape, self.shape, strict=True)):
            if not grows:
                if size not in (base, base * deeper):
                    raise LayerError(
                        f"axis {axis} of {name} is {size} in the target and {base} in the base, yet does not grow when "
                        "the width doubles: build both with the same data, vocabulary and fixed sizes."
                    )
            elif label == "in":
                fixed = self.fixed_columns(axis) if apart else 0
                m_in *= (size - fixed) / (base - fixed)
            else:
                m_out *= size / base
        if self.turned and m_in != m_out:
            raise LayerError(
                f"{name} is used in both orientations, so each of its axes is summed over once, but they grow by {m_in:g} and "
                f"{m_out:g} from the base to {list(shape)}: let both grow equally, or give each use its own parameter."
            )
        return m_in, m_out

    @property
    def role_of_fixed(self) -> str:
        """Role of the columns that meet a fixed number of entries."""
        return "input" if self.role == "hidden" else "finite"

    def fixed_columns(self, axis: int) -> int:
        """Return how many entries of an axis meet pieces of a fixed size."""
        return sum(each.end - each.begin for each in self.columns if each.axis == axis and not each.grows)

    def columns_at(self, shape: tuple[int, ...]) -> tuple[Columns, ...]:
        """Return the columns at another ``shape``, in which all growing pieces grow by the same ratio."""
        found: list[Columns] = []
        for each in self.columns:
            fixed = self.fixed_columns(each.axis)
            ratio = (shape[each.axis] - fixed) / (self.shape[each.axis] - fixed) if each.grows else 1.0
            begin = found[-1].end if found else 0
            found.append(replace(each, begin=begin, end=begin + round((each.end - each.begin) * ratio)))
        return tuple(found)

    def describe_columns(self, shape: tuple[int, ...]) -> str:
        """Return a description of which columns grow and which do not at another ``shape``."""
        columns = self.columns_at(shape)
        growing, fixed = (
            ", ".join(f"{each.begin}:{each.end}" for each in columns if each.grows == grows) for grows in (True, False)
        )
        return (
            f"entries {growing} of axis {columns[0].axis} meet inputs that grow with the width and {fixed} meet inputs of a "
            "fixed size"
        )

    def split_advice(self, shape: tuple[int, ...]) -> str:
        """Return how to split the layer in two, so that its parameters have a learning rate each."""
        columns = self.columns_at(shape)
        growing, fixed = (
            sum(each.end - each.begin for each in columns if each.grows == grows) for grows in (True, False)
        )
        owner = self.name.rpartition(".")[0] or "layer"
        return (
            f"Split the layer in two with {growing} and {fixed} inputs and add their results, {owner}(h) + {owner}_fixed(a) "
            f"instead of {owner}(torch.cat([h, a], ...)), the second with bias=False: its columns then have their own rate."
        )


def fits(shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, ParamSpec]) -> Callable[[str, str], bool]:
    """Return a function that says whether a parameter with one of ``shapes`` can be one of the base's at another width."""

    def fit(name: str, origin: str) -> bool:
        spec = specs[origin]
        sizes = zip(shapes[name], spec.shape, spec.grows, strict=True)
        return all(grows or size == base for size, base, grows in sizes)

    return fit


def kinds(specs: Mapping[str, ParamSpec]) -> dict[str, tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Return what distinguishes layers that have the same names: shapes and growing axes."""
    return {name: (spec.shape, spec.grows) for name, spec in specs.items()}


@dataclass(frozen=True)
class Observation:
    """All parameters of a family at base size, and its attention.

    Args:
        specs: name → what was observed of the parameter.
        queries: the parameters that carry a factor into the attention logits.
        shared_queries: the queries that also carry a factor into something else.
        heads: the head dim compared with that of the model of twice the width or, after `at_target`, of the target.
        attentions: the base's attention layers, as many as were traced.
        dots: other dot products, compared in the same way.
        open_branches: one parameter of every residual branch into which no parameter carries a factor.
        added_in: pattern of a parameter that ends a residual branch → pattern of the module that adds it to the stream.
        depths_compared: whether `with_depth_constants` has been applied.
        notes: what was observed but cannot be attributed to any parameter.
        seed: seed of the random numbers in the pass that uses the most parameters.
    """

    specs: dict[str, ParamSpec]
    queries: frozenset[str]
    shared_queries: frozenset[str]
    heads: Heads
    attentions: tuple[Attention, ...] = field(default=(), compare=False)
    dots: tuple[Contraction, ...] = ()
    open_branches: tuple[str, ...] = ()
    added_in: Mapping[str, str] = field(default_factory=dict)
    depths_compared: bool = False
    notes: tuple[str, ...] = ()
    seed: int = 0
