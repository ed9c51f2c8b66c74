"""What is known of a family before any target is named: one `ParamSpec` per parameter, and the attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ..errors import RequestError
from ..initialization import Init
from .columns import Columns
from .contracted import Contraction
from .heads import Heads
from .noted import Attention

__all__ = ["Observation", "ParamSpec", "fits", "kinds"]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the base model.

    Args:
        name: as in ``named_parameters``.
        shape: at base size.
        role: input, vector, hidden, output, bottleneck or finite.
        axes: what becomes of each axis (in, out, gather, each).
        grows: which axes grow with the width.
        init: what its entries are drawn from.
        tied: whether it is also the readout.
        carriers: for a tied readout, the parameters that carry a factor into its input (the final norm's).
        busy_carriers: those of them whose result something else than the readout takes in as well.
        on_data: whether the data enters the model here.
        meets: the parameters that carry a factor into what this parameter is applied to, in any of its uses.
        inside: whether it is used on a residual branch.
        ends_branch: whether it carries a factor into a residual branch's end.
        shift: s for a gain used as s + w, otherwise 0.
        constant: power of the width in the number that the forward pass itself multiplies with this parameter.
        constant_inside: whether that number is multiplied in by the module that owns the parameter.
        readout_constant: likewise of a tied matrix, with its result as a readout.
        depth_constant: power of the depth in such a number, where depths have been compared.
        sizes: for the sizes of a normalized weight (weight_norm's g), the name of the weight's own parameter.
        mixed: whether its rows have different roles (a fused matrix of which some rows grow and some do not).
        layer: the parts of the name up to the number of the layer in a stack that depth makes longer; empty where there is none.
        rounds: (a, b) where a model of depth D has a + b·D residual branches with this very parameter: (1, 0) if it is there
            once whatever the depth, (0, 1) if every layer uses it, or where depths have not been compared.
        turned: whether one use sums over the axis that survives in another (x @ w and x @ w.T).
        columns: of an axis that is summed over and made of growing and fixed pieces, which entries are which (`columns`).
        insisted: whether the role was given and not seen.
        unsplittable: why the input of a layer with such columns cannot be multiplied column by column; empty where it can.
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
    busy_carriers: frozenset[str] = frozenset()
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
        """Return (m_in, m_out) of the same parameter with another ``shape``: every axis counts by its own ratio.

        An axis that does not grow with the width may be the layers themselves: then it is ``deeper`` times as long. Of mixed
        columns all count, or with ``apart`` those that grow.

        Raises:
            RequestError: another axis differs.
        """
        name = name or self.name
        if len(shape) != len(self.shape):
            raise RequestError(f"{name} has shape {list(shape)} in the target and {list(self.shape)} in the base.")
        m_in = m_out = 1.0
        for axis, (label, grows, size, base) in enumerate(zip(self.axes, self.grows, shape, self.shape, strict=True)):
            if not grows:
                if size not in (base, base * deeper):
                    raise RequestError(
                        f"axis {axis} of {name} is {size} in the target and {base} in the base, yet does not grow when "
                        "the width doubles: build both with the same data, vocabulary and fixed sizes."
                    )
            elif label == "in":
                fixed = self.fixed_columns(axis) if apart else 0
                m_in *= (size - fixed) / (base - fixed)
            else:
                m_out *= size / base
        if self.turned and m_in != m_out:
            raise RequestError(
                f"{name} is used both ways round, so that each of its axes is summed over once, and they grow by {m_in:g} and "
                f"{m_out:g} from the base to {list(shape)}: let both grow alike, or give each use its own parameter."
            )
        return m_in, m_out

    @property
    def role_of_fixed(self) -> str:
        """The role of columns that meet a fixed number of entries."""
        return "input" if self.role == "hidden" else "finite"

    def fixed_columns(self, axis: int) -> int:
        """Return how many entries of an axis meet pieces of a fixed size."""
        return sum(each.end - each.begin for each in self.columns if each.axis == axis and not each.grows)

    def columns_at(self, shape: tuple[int, ...]) -> tuple[Columns, ...]:
        """Return the columns of the same parameter with another ``shape``, where all growing pieces grow alike."""
        found: list[Columns] = []
        for each in self.columns:
            fixed = self.fixed_columns(each.axis)
            ratio = (shape[each.axis] - fixed) / (self.shape[each.axis] - fixed) if each.grows else 1.0
            begin = found[-1].end if found else 0
            found.append(replace(each, begin=begin, end=begin + round((each.end - each.begin) * ratio)))
        return tuple(found)

    def told_columns(self, shape: tuple[int, ...]) -> str:
        """Say which columns grow and which do not, at another ``shape``."""
        columns = self.columns_at(shape)
        growing, fixed = (
            ", ".join(f"{each.begin}:{each.end}" for each in columns if each.grows == grows) for grows in (True, False)
        )
        return (
            f"{growing} of axis {columns[0].axis} meet pieces that grow with the width, {fixed} pieces of a fixed size"
        )

    def split_advice(self, shape: tuple[int, ...]) -> str:
        """Say how to split the layer in two, whose parameters then have a learning rate each."""
        columns = self.columns_at(shape)
        growing, fixed = (
            sum(each.end - each.begin for each in columns if each.grows == grows) for grows in (True, False)
        )
        owner = self.name.rpartition(".")[0] or "layer"
        return (
            f"Split the layer in two with {growing} and {fixed} inputs and add their results, {owner}(h) + {owner}_fixed(a) in "
            f"place of {owner}(torch.cat([h, a], ...)), the second with bias=False: its columns then have a rate of their own."
        )


def fits(shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, ParamSpec]) -> Callable[[str, str], bool]:
    """Return what says whether a parameter with one of ``shapes`` can be one of the base's at another width."""

    def fit(name: str, origin: str) -> bool:
        spec = specs[origin]
        sizes = zip(shapes[name], spec.shape, spec.grows, strict=True)
        return all(grows or size == base for size, base, grows in sizes)

    return fit


def kinds(specs: Mapping[str, ParamSpec]) -> dict[str, tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Return what tells layers apart that are named alike."""
    return {name: (spec.shape, spec.grows) for name, spec in specs.items()}


@dataclass(frozen=True)
class Observation:
    """All parameters of a family at base size, and its attention.

    ``queries`` carry a factor into the attention logits, ``shared_queries`` of them also into something else.
    ``heads`` compares the head dim with the model of twice the width or, after `at_target`, with the target's, from the
    base's ``attentions``, and ``dots`` likewise other dot products. ``open_branches`` names a parameter of every residual
    branch into which none carries a factor; ``depths_compared`` says that `with_depth_constants` has looked; ``notes`` says
    what was seen and could not be written on any parameter; ``seed`` is what the fullest forward pass's random numbers start
    from.
    """

    specs: dict[str, ParamSpec]
    queries: frozenset[str]
    shared_queries: frozenset[str]
    heads: Heads
    attentions: tuple[Attention, ...] = field(default=(), compare=False)  # of as many layers as were watched
    dots: tuple[Contraction, ...] = ()
    open_branches: tuple[str, ...] = ()
    depths_compared: bool = False
    notes: tuple[str, ...] = ()
    seed: int = 0
