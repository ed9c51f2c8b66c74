"""Learning-rate basins across widths: the optimum, its drift, and the regret of the proxy's optimum."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from .errors import FrameError
from .schemas import OPTIMA

__all__ = [
    "DRIFT_LIMIT",
    "REGRET_LIMIT",
    "Bracket",
    "bracket",
    "flat_range",
    "judge",
    "optima",
    "seed_table",
    "worth",
]

DRIFT_LIMIT = 0.5  # octaves: half a step of the usual factor-2 grid
REGRET_LIMIT = (
    0.02  # nats: the least that the seeds of a proxy of this size resolve, and a tenth of what SP loses on it
)
REACH = 2.0  # octaves on each side of the best point that a fit uses
JUMP = 16.0  # times the parabolic rise on the other side; a parabola with its vertex within half a step reaches 4
MOST_SEEDS = 100  # largest number of additional seeds to suggest
RESOLUTION = 240  # grid intervals of the search for a curve's minimum, before it is refined


@dataclass(frozen=True)
class Bracket:
    """Indices into a width's learning rates: the best one, and the first and last of its smooth basin.

    ``cliff_low`` and ``cliff_high`` are true if the basin ends at a cliff that may hide the optimum: the next rate diverged, or
    its loss jumps more than any parabola would, and the last rate before it may be the best.
    """

    best: int
    first: int
    last: int
    cliff_low: bool
    cliff_high: bool


def seed_table(group: pd.DataFrame) -> pd.DataFrame:
    """Return one width's losses as (seeds, learning rates), infinite where diverged; only rates that every seed has run."""
    losses = group["loss"].where(~group["diverged"].astype(bool), math.inf).fillna(math.inf)
    table = group.assign(loss=losses).pivot_table(index="seed", columns="log2_lr", values="loss", dropna=False)
    return table.dropna(axis="columns")


def bracket(x: np.ndarray, losses: np.ndarray, flat: float = 0.0) -> Bracket:
    """Return the position of the best mean loss and the extent of its basin.

    The basin holds the points within 2 octaves of the best one (at least two on each side), and beyond these all points that
    the seeds cannot distinguish from it or that cost at most ``flat``. It ends at a cliff, which is reported if the point before
    the cliff may be the best.

    Args:
        x: log2 of the learning rates, ascending.
        losses: (seeds, rates), infinite where diverged.
        flat: largest loss above the best for a point beyond 2 octaves, in the loss's unit.
    """
    means = losses.mean(axis=0)
    best = int(means.argmin())
    if not np.isfinite(means[best]):
        return Bracket(best, best, best, False, False)
    noise = _mean_noise(losses)
    ends, cliffs = [best, best], [False, False]
    for side, step in enumerate((-1, 1)):
        i = best
        while 0 <= (j := i + step) < len(x):
            if not np.isfinite(means[j]) or _jumps(x, means, i, j, best, noise):
                cliffs[side] = bool(means[i] - means[best] <= 3 * noise)
                break
            within = abs(x[j] - x[best]) <= REACH + 1e-9 or abs(j - best) <= 2
            if not within and means[j] - means[best] > max(4 * noise, flat):
                break
            i = j
        ends[side] = i
    return Bracket(best, ends[0], ends[1], cliffs[0], cliffs[1])


def _mean_noise(losses: np.ndarray) -> float:
    """Return the standard error of the difference of two learning rates' mean losses, without the offsets of the seeds."""
    finite = losses[:, np.isfinite(losses).all(axis=0)]
    if min(finite.shape, default=0) < 2:
        return 0.0
    rest = finite - finite.mean(axis=0) - finite.mean(axis=1, keepdims=True) + finite.mean()
    # The median, because the seeds spread most far from the optimum.
    variances = (rest**2).sum(axis=0) / (len(finite) - 1)
    return math.sqrt(2 * float(np.median(variances)) / len(finite))


def _jumps(x: np.ndarray, means: np.ndarray, i: int, j: int, best: int, noise: float) -> bool:
    """Return whether the loss rises from point i to its neighbour j, away from the best one, more than any parabola would."""
    step = 1 if j > i else -1
    others = [k for k in range(len(x)) if (k - best) * step < 0 and np.isfinite(means[k])]
    far = [k for k in others if abs(x[k] - x[best]) <= max(REACH, 2 * abs(x[j] - x[i])) + 1e-9]
    if not far:
        return False
    other = max(far, key=lambda k: abs(x[k] - x[best]))
    rise, reach = means[j] - means[i], abs(x[j] - x[best])
    opposite = max(means[other] - means[best], 0.0) / abs(x[other] - x[best]) ** 2
    return bool(rise > JUMP * opposite * reach**2 + 8 * noise and rise > 0)


def optima(
    basins: pd.DataFrame,
    transferred: float | None = None,
    *,
    maximize: bool = False,
    regret_limit: float = REGRET_LIMIT,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return one row per parametrization and width (`schemas.OPTIMA`).

    At each width a curve is fitted to the mean losses around the best grid point, in log2 of the learning rate: a parabola,
    with higher terms whose size is estimated from all widths together. The optimum is its minimum, and the regret is its height
    at the transferred rate above that minimum. The 95% intervals come from curves drawn from the fit's distribution: the noise
    of one run is estimated over all learning rates, since every seed has run all of them, and shifts of a seed's whole basin
    are estimated over all widths. Three seeds are therefore enough, and noisy seeds never give an interval of width 0.

    At a cliff (`Bracket`), the optimum's interval includes the whole cell between the best point and the one beyond the cliff,
    and the regret's interval includes the curve extended into that cell. An interval is infinite on a side where the learning
    rates tried do not bound the optimum.

    Args:
        basins: a frame with the columns of `schemas.BASINS`; every width of a parametrization has the same seeds.
        transferred: log2 of the transferred learning rate; by default the best grid point of the smallest width. The regret
            is NaN at a width whose grid lacks this rate, and infinite where it diverged.
        maximize: the loss column holds a metric that is to be maximized.
        regret_limit: limit for the range of learning rates that cost no more, in the loss's unit.
        resamples: number of curves drawn.
        seed: random seed of the draws.

    Raises:
        FrameError: there are no runs, or a width has a different set of seeds than the smallest one.
    """
    if basins.empty:
        raise FrameError("there are no learning-rate basins: run `mutransfer verify RUN` first.")
    if maximize:
        basins = basins.assign(loss=-basins["loss"])
    rows: list[dict[str, Any]] = []
    for name, group in basins.groupby("parametrization", sort=False):
        tables = {int(width): seed_table(table) for width, table in group.groupby("width")}
        seeds = next(iter(tables.values())).index
        for width, table in tables.items():
            if list(table.index) != list(seeds):
                raise FrameError(
                    f"width {width} of {name} has seeds {list(table.index)}, but the smallest width has {list(seeds)}."
                )
        if transferred is None:
            first = next(iter(tables.values()))
            transferred = float(first.columns[int(first.to_numpy().mean(axis=0).argmin())])
        per_width = [_Basin.of(table, regret_limit) for table in tables.values()]
        random = np.random.default_rng(seed)
        fits = [_Fit.of(basin, per_width, random, resamples) for basin in per_width]
        for width, fit in zip(tables, fits, strict=True):
            row = _summary(fit, fits[0], transferred, regret_limit, random)
            if maximize:
                row |= {"best_loss": -row["best_loss"], "transferred_loss": -row["transferred_loss"]}
            rows.append({"parametrization": name, "width": width} | row)
    return OPTIMA.frame(rows)


@dataclass(frozen=True)
class _Basin:
    """One width's losses, and the part that a curve is fitted to."""

    x: np.ndarray  # (rates,) all learning rates
    losses: np.ndarray  # (seeds, rates)
    at: Bracket

    @classmethod
    def of(cls, table: pd.DataFrame, flat: float) -> _Basin:
        x, losses = table.columns.to_numpy(dtype=float), table.to_numpy()
        return cls(x, losses, bracket(x, losses, flat))

    @property
    def near(self) -> slice:
        return slice(self.at.first, self.at.last + 1)

    @property
    def z(self) -> np.ndarray:
        """The learning rates of the fit relative to the best one, in units of ``REACH``."""
        return (self.x[self.near] - self.x[self.at.best]) / REACH

    @property
    def means(self) -> np.ndarray:
        return self.losses[:, self.near].mean(axis=0)

    def residuals(self) -> tuple[float, int, np.ndarray]:
        """Return the variance of one run, its degrees of freedom, and each seed's slope.

        Runs differ by seed and by learning rate. A seed may also shift its whole basin, which shows as a slope of its losses.
        """
        losses, z = self.losses[:, self.near], self.z
        seeds, points = losses.shape
        if seeds < 2 or points < 2 or not np.isfinite(losses).all():
            return 0.0, 0, np.zeros(seeds)
        rest = losses - losses.mean(axis=0) - losses.mean(axis=1, keepdims=True) + losses.mean()
        line = z - z.mean()
        slopes = rest @ line / (line @ line)
        degrees = (seeds - 1) * (points - 1)
        return float((rest**2).sum()) / degrees, degrees, slopes

    def slope_variance(self) -> float:
        """Return the variance of a seed's slope per variance of one run, if runs are independent."""
        line = self.z - self.z.mean()
        return 1 / float(line @ line) if len(line) > 1 else 0.0


@dataclass(frozen=True)
class _Fit:
    """Curves of one width: row 0 of every array is the fitted curve, the other rows are drawn from its distribution."""

    basin: _Basin
    coefficients: np.ndarray  # (1 + resamples, powers) of z
    vertex: np.ndarray  # (1 + resamples,) log2 lr of the minimum within the measured range
    lowest: np.ndarray  # (1 + resamples,) loss at the vertex
    beyond: np.ndarray  # (1 + resamples,) lowest loss if the curve continues to the far side of a cliff
    has_interval: bool  # whether there are enough seeds for an interval

    @classmethod
    def of(cls, basin: _Basin, per_width: list[_Basin], random: np.random.Generator, resamples: int) -> _Fit:
        seeds = len(basin.losses)
        if not np.isfinite(basin.means).all():  # every learning rate diverged
            nothing = np.full(1 + resamples, math.nan)
            return cls(basin, np.full((1 + resamples, 1), math.inf), nothing, nothing, nothing, False)
        mean, covariance, degrees = _posterior(basin, per_width)
        normal = random.standard_normal((resamples, len(mean)))
        spread = np.sqrt(degrees / random.chisquare(degrees, resamples)) if degrees else np.ones(resamples)
        drawn = mean + spread[:, None] * (normal @ _root(covariance).T)
        coefficients = np.vstack([mean[None], drawn])
        x, best, near = basin.x, basin.x[basin.at.best], basin.x[basin.near]
        vertex, lowest = _minimum(coefficients, near[0], near[-1], best)
        beyond = lowest
        if basin.at.cliff_high:
            beyond = np.minimum(beyond, _minimum(coefficients, near[-1], x[basin.at.last + 1], best)[1])
        if basin.at.cliff_low:
            beyond = np.minimum(beyond, _minimum(coefficients, x[basin.at.first - 1], near[0], best)[1])
        return cls(basin, coefficients, vertex, lowest, beyond, seeds >= 3)

    def height(self, x: float | np.ndarray) -> np.ndarray:
        """Return the curves at ``x``: (1 + resamples,) or (1 + resamples, len(x))."""
        z = (np.asarray(x) - self.basin.x[self.basin.at.best]) / REACH
        return self.coefficients @ np.power.outer(z, np.arange(self.coefficients.shape[1])).T

    def ends(self) -> tuple[float, float]:
        """Return the 95% interval of the optimum, including the whole of an unresolved cell; infinite where nothing bounds it."""
        x, at = self.basin.x, self.basin.at
        low, high = _quantiles(self.vertex)
        # A minimum at an end of the fitted range means that the optimum is there or beyond.
        if low <= x[at.first] or at.cliff_low:
            low = x[at.first - 1] if at.first > 0 else -math.inf
        if high >= x[at.last] or at.cliff_high:
            high = x[at.last + 1] if at.last < len(x) - 1 else math.inf
        return float(low), float(high)


def _posterior(basin: _Basin, per_width: list[_Basin]) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the mean and covariance of a curve's coefficients (of 1, z, z², …), and Student's degrees of freedom.

    The higher terms are shrunk towards 0 according to their mean square over the widths (empirical Bayes): the curve is a
    parabola if all widths look parabolic, and passes through the points if they do not and the noise is small.
    """
    noise, degrees = _noise(basin, per_width)
    y, z = basin.means - basin.means.min(), basin.z
    sizes = _typical_sizes(per_width) if len(z) > 2 else []
    design = np.vander(z, min(len(z), 3) + len(sizes), increasing=True)
    scale = float(np.ptp(basin.means)) or 1.0
    prior = np.array([0.0] * min(len(z), 3) + [1 / size**2 if size > 1e-9 * scale else math.inf for size in sizes])
    design, prior = design[:, np.isfinite(prior)], prior[np.isfinite(prior)]
    # The square of a spread below 1e-152 would be 0, and divided by.
    variance = max(noise / len(basin.losses), (1e-10 * scale) ** 2, sys.float_info.min)
    # Invert the stacked rows, not their products: without noise, the prior would be rounded away in a sum with 1 / variance.
    inverse = np.linalg.pinv(np.vstack([design / math.sqrt(variance), np.diag(np.sqrt(prior))]), rcond=1e-14)
    covariance = inverse @ inverse.T
    mean = inverse[:, : len(y)] @ y / math.sqrt(variance)
    if noise <= (1e-12 * scale) ** 2:  # rounding
        covariance = np.zeros_like(covariance)
    elif len(mean) > 1:
        covariance[1, 1] += noise / len(basin.losses) * basin.slope_variance() * (_slope_excess(per_width) - 1)
    mean[0] += basin.means.min()
    return mean, covariance, degrees


def _typical_sizes(per_width: list[_Basin]) -> list[float]:
    """Return the typical sizes of the coefficients of z³, z⁴ and z⁵: root mean squares over the widths, noise included.

    The size for z⁵, which five points do not determine, is extrapolated from the other two.
    """
    cubic, quartic = [], []
    for basin in per_width:
        if len(basin.z) > 3 and np.isfinite(basin.means).all():
            found = np.polynomial.polynomial.polyfit(basin.z, basin.means, min(4, len(basin.z) - 1))
            cubic.append(found[3])
            quartic += list(found[4:])
    third, fourth = (math.sqrt(float(np.mean(np.square(each)))) if each else 0.0 for each in (cubic, quartic))
    return [third, fourth, fourth * min(1.0, fourth / third) if third else 0.0]


def _noise(basin: _Basin, per_width: list[_Basin], borrowed: int = 2) -> tuple[float, int]:
    """Return the variance of one run at this width, and its degrees of freedom.

    It is averaged with the variance over all widths, which counts as ``borrowed`` degrees of freedom, so that the variance of a
    width with few points is not underestimated.
    """
    parts = [(variance, degrees) for variance, degrees, _ in (each.residuals() for each in per_width) if degrees]
    total = sum(degrees for _, degrees in parts)
    if not total:
        return 0.0, 0
    pooled = sum(variance * degrees for variance, degrees in parts) / total
    variance, degrees, _ = basin.residuals()
    free = min(degrees + borrowed, total, len(per_width) * (len(basin.losses) - 1))
    return (variance * degrees + pooled * borrowed) / (degrees + borrowed), free


def _slope_excess(per_width: list[_Basin]) -> float:
    """Return the variance of the seeds' slopes relative to that of independent runs, at least 1."""
    ratios = []
    for basin in per_width:
        slopes = basin.residuals()[2]
        expected = _noise(basin, per_width)[0] * basin.slope_variance()
        if expected > 0 and len(slopes) > 1:
            ratios.append(float(slopes @ slopes) / (len(slopes) - 1) / expected)
    return max(1.0, float(np.mean(ratios))) if ratios else 1.0


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.clip(values, 0, None))


def _minimum(coefficients: np.ndarray, low: float, high: float, origin: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each curve's minimum between ``low`` and ``high``, and its height there."""
    x = np.linspace(low, high, RESOLUTION + 1)
    powers = np.arange(coefficients.shape[1])
    heights = coefficients @ np.power.outer((x - origin) / REACH, powers).T
    at = heights.argmin(axis=1)
    rows = np.arange(len(heights))
    position, lowest = x[at], heights[rows, at]
    inner = np.clip(at, 1, RESOLUTION - 1)
    left, middle, right = (heights[rows, inner + k] for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = np.clip((left - right) / (2 * bend), -0.5, 0.5)
    better = (inner == at) & (bend > 0)
    finer = np.where(better, x[inner] + shift * (x[1] - x[0]), position)
    depth = np.where(better, middle - (left - right) ** 2 / (8 * np.where(bend > 0, bend, 1)), lowest)
    return finer, np.minimum(lowest, depth)


def _quantiles(samples: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95% interval of the drawn values, extended to the estimate, which comes first."""
    low, high = np.quantile(samples[1:], [0.025, 0.975], method="nearest")
    return min(float(low), float(samples[0])), max(float(high), float(samples[0]))


def _summary(
    fit: _Fit, start: _Fit, transferred: float, regret_limit: float, random: np.random.Generator
) -> dict[str, Any]:
    basin, at = fit.basin, fit.basin.at
    means = basin.losses.mean(axis=0)
    low, high = fit.ends()
    start_low, start_high = start.ends()
    drift = fit.vertex - start.vertex
    if fit is start:
        drift_low = drift_high = 0.0
    else:
        drift_low, drift_high = _quantiles(drift)
        # Unresolved cells and open ends add to the uncertainty from the seeds.
        fit_low, fit_high = _quantiles(fit.vertex)
        from_low, from_high = _quantiles(start.vertex)
        drift_low += min(0.0, low - fit_low) - max(0.0, start_high - from_high)
        drift_high += max(0.0, high - fit_high) - min(0.0, start_low - from_low)
    regret, regret_low, regret_high, carried = _regret(fit, transferred, (low, high), random)
    certain, possible = _flat(fit, transferred, regret_limit)
    edge = at.best in (0, len(basin.x) - 1)
    best_loss = float(means[at.best])
    intervals = {
        "log2_lr_low": low, "log2_lr_high": high, "drift_low": drift_low, "drift_high": drift_high,
        "regret_low": regret_low, "regret_high": math.inf if edge and regret == regret else regret_high,
    }  # fmt: skip
    if not fit.has_interval:
        intervals = dict.fromkeys(intervals, math.nan)
    cells = [basin.x[at.last + 1] - basin.x[at.last]] if at.cliff_high else []
    cells += [basin.x[at.first] - basin.x[at.first - 1]] if at.cliff_low else []
    return intervals | {
        "log2_lr": float(fit.vertex[0]), "drift": float(drift[0]), "best_loss": best_loss, "transferred_loss": carried,
        "regret": regret, "at_edge": edge, "regret_relative": regret / best_loss if best_loss > 0 else math.nan,
        "cell": float(max(cells, default=0.0)), "flat_low": certain[0], "flat_high": certain[1],
        "perhaps_flat_low": possible[0], "perhaps_flat_high": possible[1], "seeds": len(basin.losses),
    }  # fmt: skip


def _regret(
    fit: _Fit, transferred: float, optimum: tuple[float, float], random: np.random.Generator
) -> tuple[float, float, float, float]:
    """Return the regret, the ends of its interval, and the mean loss at the transferred learning rate."""
    basin, at = fit.basin, fit.basin.at
    found = np.flatnonzero(np.isclose(basin.x, transferred))
    if not len(found):
        return (math.nan,) * 4
    i = int(found[0])
    losses = basin.losses[:, i]
    if not np.isfinite(losses).all():
        # Certainly infinite if every seed diverged, but not if only some did.
        return math.inf, 0.0 if np.isfinite(losses).any() else math.inf, math.inf, math.inf
    carried = float(losses.mean())
    if at.first <= i <= at.last:
        heights = fit.height(transferred)
    else:
        away = losses - basin.losses[:, basin.near].mean(axis=1)
        error = float(away.std(ddof=1)) / math.sqrt(len(away)) if len(away) > 1 else 0.0
        heights = carried + error * np.concatenate(
            [[0.0], random.standard_t(max(len(away) - 1, 1), len(fit.lowest) - 1)]
        )
    lowest = np.minimum(fit.lowest, heights)
    regret = heights - lowest
    tiny = 1e-12 * max(1.0, abs(carried))
    value = float(regret[0]) if regret[0] > tiny else 0.0
    low = _quantiles(regret)[0]
    high = _quantiles(np.maximum(heights - np.minimum(fit.beyond, heights), regret))[1]
    if optimum[0] <= transferred <= optimum[1]:
        low = 0.0
    return value, max(0.0, min(low, value)), max(high, value) if high > tiny else 0.0, carried


def _flat(fit: _Fit, transferred: float, limit: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return two ranges of rates around the transferred one: those that certainly, and that possibly, cost at most ``limit``.

    A rate is certain if the upper end of its cost's 95% interval is within the limit, and possible if the lower end is. The ends
    of an empty range are NaN.
    """
    none = math.nan, math.nan
    near = fit.basin.x[fit.basin.near]
    if not fit.has_interval or not near[0] - 1e-9 <= transferred <= near[-1] + 1e-9:
        return none, none
    x = np.linspace(near[0], near[-1], RESOLUTION + 1)
    heights, at = fit.height(x)[1:], int(np.abs(x - transferred).argmin())
    ranges = []
    for lowest, end in ((fit.beyond, 0.975), (fit.lowest, 0.025)):
        cost = np.quantile(heights - lowest[1:, None], end, axis=0, method="nearest")
        worse = np.flatnonzero(cost > limit)
        low = max(worse[worse <= at], default=-1) + 1
        high = min(worse[worse >= at], default=RESOLUTION + 1) - 1
        ranges.append((float(x[low]), float(x[high])) if low <= high else none)
    return ranges[0], ranges[1]


def flat_range(
    optima: pd.DataFrame, drift_limit: float = DRIFT_LIMIT, *, perhaps: bool = False
) -> tuple[float, float] | None:
    """Return the range of log2 learning rates that cost no more than the regret limit at every width.

    The range contains the transferred rate; it is None if it spans less than ``drift_limit`` octaves. It holds the rates for
    which this is certain or, with ``perhaps``, those for which it is not ruled out.
    """
    name = "perhaps_flat" if perhaps else "flat"
    low, high = optima[f"{name}_low"].max(skipna=False), optima[f"{name}_high"].min(skipna=False)
    return (float(low), float(high)) if high - low >= drift_limit else None


def worth(optima: pd.DataFrame, basins: pd.DataFrame, *, maximize: bool = False) -> dict[str, float] | None:
    """Return the fraction of the widest model's compute that its regret is worth, with the regret's 95% interval.

    The best losses of the last two widths give the rate at which the loss falls with the logarithm of compute, and the regret is
    converted at that rate. The result is None if there are fewer than three widths, if the loss does not fall from each to the
    next, if the compute or the regret is not known, or if the regret exceeds the gain over the measured widths, to which the rate
    does not apply.

    Args:
        optima: rows of one parametrization from `optima`.
        basins: the runs behind them, with their FLOPs.
        maximize: the loss is a metric that is to be maximized.
    """
    rows = optima.sort_values("width")
    name = rows["parametrization"].iloc[0]
    flops = (
        basins[(basins["parametrization"] == name) & ~basins["diverged"].astype(bool)].groupby("width")["flops"].max()
    )
    sizes = flops.reindex(rows["width"]).to_numpy(float)
    losses, regret = (
        (-1 if maximize else 1) * rows["best_loss"].to_numpy(float),
        rows[["regret", "regret_low", "regret_high"]].iloc[-1],
    )
    if len(rows) < 3 or not np.isfinite([*losses, *sizes, *regret]).all() or not (np.diff(losses) < 0).all():
        return None
    if not (np.diff(sizes) > 0).all() or regret.iloc[0] > losses[0] - losses[-1]:
        return None
    pace = float((losses[-2] - losses[-1]) / math.log(sizes[-1] / sizes[-2]))
    value, low, high = (1 - math.exp(-each / pace) for each in regret)
    return {"value": value, "low": low, "high": high}


def judge(
    optima: pd.DataFrame,
    drift_limit: float = DRIFT_LIMIT,
    regret_limit: float = REGRET_LIMIT,
    unit: str = "in the loss's unit",
) -> tuple[Literal["pass", "fail", "undecided"], list[str]]:
    """Return whether the proxy's learning rate transferred, with the reasons in sentences.

    - Pass: at every width the proxy's learning rate costs at most ``regret_limit``, and either the optimum moved by at most
      ``drift_limit`` octaves or the basins are flat: a range of rates of that length costs no more at any width. Both must hold
      for the whole 95% interval.
    - Fail: at some width an interval lies entirely beyond its limit. A drift fails only if the basins are certainly not flat,
      since a drift that costs nothing is not a failure.
    - Undecided: otherwise, including fewer than 3 seeds, which give no interval, and a best rate at the edge of those tried.

    Args:
        optima: rows of one parametrization from `optima`.
        drift_limit: in octaves.
        regret_limit: in the loss's unit.
        unit: the unit to print after a regret, such as "nats".
    """
    failed, undecided = [], []
    flat = flat_range(optima, drift_limit) if (optima["regret_high"] <= regret_limit).all() else None
    perhaps = flat_range(optima, drift_limit, perhaps=True) is not None
    drifted = False
    for row in optima.itertuples():
        moved = f"width {row.width}: the best learning rate drifts {row.drift:+.2f} octaves"
        costs = f"width {row.width}: the proxy's learning rate costs {row.regret:.4f} {unit}"
        if math.isinf(row.best_loss):
            failed.append(f"width {row.width}: every learning rate that was tried diverges.")
            continue
        if math.isnan(row.drift_low):
            undecided.append(f"{moved}, but fewer than 3 seeds give no interval: add seeds.")
            continue
        interval = f"[{row.drift_low:+.2f}, {row.drift_high:+.2f}]"
        moves = row.drift_low > drift_limit or row.drift_high < -drift_limit
        stays = -drift_limit <= row.drift_low and row.drift_high <= drift_limit
        if flat is not None:
            drifted |= not stays
        elif moves and perhaps:
            undecided.append(f"{moved} {interval}, but this may cost nothing: add seeds.")
        elif moves:
            failed.append(f"{moved} {interval}.")
        elif not stays:
            ends = row.drift_low, row.drift_high
            undecided.append(f"{moved} {interval}: {_advice(row, row.drift, ends, drift_limit)}.")
        if math.isnan(row.regret):
            undecided.append(
                f"width {row.width}: it is not known what the proxy's learning rate costs, because it was not tried."
            )
        elif math.isinf(row.regret):
            if math.isinf(row.regret_low):
                failed.append(f"width {row.width}: the proxy's learning rate diverges.")
            else:
                undecided.append(f"width {row.width}: the proxy's learning rate diverges with some seeds: add seeds.")
        elif row.regret_low > regret_limit:
            failed.append(f"{costs} [{row.regret_low:.4f}, {row.regret_high:.4f}].")
        elif not row.regret_high <= regret_limit and not row.at_edge:
            ends = row.regret_low, row.regret_high
            advice = _advice(row, row.regret, ends, regret_limit)
            undecided.append(
                f"{costs} [{row.regret_low:.4f}, {row.regret_high:.4f}], limit {regret_limit:.4g}: {advice}."
            )
        if row.at_edge:
            undecided.append(f"width {row.width}: the best learning rate is at the edge of those tried.")
    if failed or undecided:
        return ("fail", failed) if failed else ("undecided", undecided)
    if flat is not None and drifted:
        low, high = flat
        return "pass", [
            f"flat: any rate from 2^{low:.2f} to 2^{high:.2f} is equally good, within {regret_limit:g} {unit}."
        ]
    return "pass", []


def _advice(row: Any, value: float, ends: tuple[float, float], limit: float) -> str:
    """Return advice on what would decide: more learning rates near a cliff, or how many more seeds."""
    if row.cell > limit / 2 and row.cell >= 0.25:
        apart = f"{row.cell:.2g} octave{'' if row.cell == 1 else 's'}"
        return f"the best rate and the next one, which diverges, are {apart} apart: add rates between them"
    seeds = row.seeds
    beyond = abs(value) - limit
    toward = value if value > 0 else -value
    half = (
        max(toward - (ends[0] if value > 0 else -ends[1]), 0)
        if beyond > 0
        else max((ends[1] if value >= 0 else -ends[0]) - toward, 0)
    )
    if not (math.isfinite(half) and math.isfinite(beyond) and beyond and seeds == seeds):
        return "the interval is not decisive: add seeds"
    needed = math.ceil(seeds * (half / beyond) ** 2) - int(seeds)
    if needed > MOST_SEEDS:
        return "too close to the limit for any practical number of seeds to decide"
    return f"add seeds: about {max(needed, 1)} more would decide this"
