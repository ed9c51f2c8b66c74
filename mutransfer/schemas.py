"""Schemas of all data frames: column names, dtypes and units, shared by the code that measures and the code that draws."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .errors import FrameError, RequestError
from .io import write_bytes, write_text

__all__ = ["BASINS", "COORDINATES", "OPTIMA", "PARAMETERS", "REPEATS", "SLOPES", "TRIALS", "Schema", "varying"]

PARQUET = ".parquet"


@dataclass(frozen=True)
class Schema:
    """The columns of one kind of frame: name → (pandas dtype, meaning and unit).

    ``open`` allows further columns after the named ones (a trial's hyperparameters). Columns of floats in ``optional`` are filled
    with missing values in frames that were written before these columns existed.
    """

    name: str
    columns: dict[str, tuple[str, str]]
    open: bool = False
    optional: tuple[str, ...] = ()

    def frame(self, rows: list[dict[str, object]] | pd.DataFrame) -> pd.DataFrame:
        """Return ``rows`` as a frame with this schema's columns, order and dtypes.

        Raises:
            FrameError: a column is missing, or is unknown and the schema is not open.
        """
        frame = pd.DataFrame(rows, columns=None if len(rows) else list(self.columns))
        frame = frame.assign(**{column: float("nan") for column in self.optional if column not in frame})
        missing = [column for column in self.columns if column not in frame]
        extra = [column for column in frame if column not in self.columns]
        if missing or (extra and not self.open):
            raise FrameError(
                f"the {self.name} frame needs the columns {', '.join(self.columns)}: "
                + (f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(map(str, extra))}")
                + "."
            )
        types = {column: dtype for column, (dtype, _) in self.columns.items()}
        return frame[[*self.columns, *extra]].astype(types)

    def write(self, frame: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
        """Write ``frame`` atomically, as Parquet if ``path`` ends in .parquet, else as CSV; floats keep every digit.

        Raises:
            FrameError: a column is missing or unknown.
            RequestError: Parquet is requested but pyarrow is not installed.
            FileError: the file cannot be written.
        """
        validated = self.frame(frame)
        if Path(path).suffix == PARQUET:
            with _needing_pyarrow(path):
                return write_bytes(path, validated.to_parquet(None, index=False))
        return write_text(path, validated.to_csv(index=False))

    def read(self, path: str | os.PathLike[str]) -> pd.DataFrame:
        """Read a CSV or Parquet file that `write` wrote.

        Raises:
            FrameError: the file does not exist, is not valid CSV or Parquet, or lacks a column.
        """
        parquet = Path(path).suffix == PARQUET
        try:
            if parquet:
                with _needing_pyarrow(path):
                    frame = pd.read_parquet(path)
            else:
                text = Path(path).read_text(encoding="utf-8")
                # "NA" and "null" may be module names: only an empty cell is a missing value.
                frame = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""])
        except FileNotFoundError:
            raise FrameError(
                f"there is no {path}: expected the {self.name} frame as {'Parquet' if parquet else 'CSV'}."
            ) from None
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError, ValueError) as error:
            kind = "Parquet file" if parquet else "CSV"
            raise FrameError(f"{path} is not a {kind} of the {self.name} frame ({str(error).strip()}).") from None
        return self.frame(frame)


@contextlib.contextmanager
def _needing_pyarrow(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise RequestError(
            f"{path} needs pyarrow: pip install 'mutransfer[parquet]', or choose a file name that ends in .csv."
        ) from None


COORDINATES = Schema(
    "coordinates",
    {
        "parametrization": ("string", "name of the table in force"),
        "optimizer": ("string", "name of the optimizer"),
        "module": ("string", "module's qualified name, or a parameter's for update, step, gradient, decay and weight"),
        "role": (
            "string",
            "role of its weight: input, hidden, …; output if its result is a logit; stream if it has no weight; attention, or "
            "attention vector, for queries and keys whose head dim grows; gain for a normalized readout",
        ),
        "statistic": (
            "string",
            "activation: mean |x|; change: mean |x_t − x_0|; input: mean |x| of the module's input; update: mean |ΔW·x|; step: "
            "the learning rate implied by the largest |ΔW|, relative to µP's; gradient: mean |g| / epsilon; "
            "decay: lr · weight decay; weight: root mean square, relative to µP's initial size",
        ),
        "step": ("int64", "optimizer steps done before this was measured"),
        "seed": ("int64", "seed of the initial weights"),
        "width": ("int64", "width of the model"),
        "depth": ("int64", "depth of the model"),
        "value": (
            "float64",
            "the statistic: a size of entries, in the units of the module's output unless stated otherwise",
        ),
    },
)

SLOPES = Schema(
    "slopes",
    {
        "parametrization": ("string", "name of the table in force"),
        "module": ("string", "module's qualified name, or a parameter's for update, step, gradient, decay and weight"),
        "role": ("string", "as in the coordinates frame"),
        "statistic": ("string", "activation, change, update, step, gradient, decay or weight"),
        "step": ("int64", "optimizer steps done"),
        "slope": ("float64", "d log2(value) / d log2(width)"),
        "low": ("float64", "lower end of the 95% interval over seeds"),
        "high": ("float64", "upper end of the 95% interval over seeds"),
        "expected": ("string", "range of slopes of width-stable learning, as 'low..high'"),
        "declared": ("string", "range of slopes the parametrization in force declares"),
        "ok": ("boolean", "inside the expected range with margin; missing if the evidence is not sufficient"),
    },
)

BASINS = Schema(
    "basins",
    {
        "parametrization": ("string", "name of the table in force"),
        "width": ("int64", "width of the model"),
        "depth": ("int64", "depth of the model"),
        "seed": ("int64", "seed of weights and data order"),
        "log2_lr": ("float64", "log2 of the base learning rate, before any factor"),
        "loss": ("float64", "validation loss at the end; missing when diverged"),
        "diverged": ("boolean", "the loss was not finite, or ended above its start"),
        "flops": ("float64", "floating point operations of the run"),
        "seconds": ("float64", "wall-clock time of the run"),
    },
)

OPTIMA = Schema(
    "optima",
    {
        "parametrization": ("string", "name of the table in force"),
        "width": ("int64", "width of the model"),
        "log2_lr": ("float64", "optimal log2 base learning rate: the minimum of the fitted basin"),
        "log2_lr_low": (
            "float64",
            "lower end of its 95% interval over seeds, including the whole of an unresolved cell",
        ),
        "log2_lr_high": ("float64", "upper end; infinite where the learning rates tried do not bound the optimum"),
        "drift": ("float64", "optimum minus the smallest width's optimum, octaves (factors of 2)"),
        "drift_low": ("float64", "lower end of its 95% interval over seeds"),
        "drift_high": ("float64", "upper end"),
        "best_loss": ("float64", "mean loss at the best grid point of this width"),
        "transferred_loss": ("float64", "mean loss at the transferred learning rate; infinite where it diverged"),
        "regret": ("float64", "fitted loss at the transferred rate minus the fitted minimum, in the loss's unit"),
        "regret_low": ("float64", "lower end of its 95% interval over seeds"),
        "regret_high": ("float64", "upper end"),
        "at_edge": ("boolean", "the best grid point is the first or last: the optimum may lie outside"),
        "regret_relative": ("float64", "regret / best_loss, where that is positive"),
        "cell": ("float64", "octaves between the best grid point and the other side of a cliff; 0 without a cliff"),
        "flat_low": ("float64", "lowest log2 learning rate of those that certainly cost no more than the regret limit"),
        "flat_high": ("float64", "highest"),
        "perhaps_flat_low": (
            "float64",
            "lowest log2 learning rate of those that may cost no more than the regret limit",
        ),
        "perhaps_flat_high": ("float64", "highest"),
        "seeds": ("float64", "seeds behind each mean"),
    },
    optional=("regret_relative", "cell", "flat_low", "flat_high", "perhaps_flat_low", "perhaps_flat_high", "seeds"),
)

TRIALS = Schema(
    "trials",
    {
        "number": ("int64", "the trial's number in the study"),
        "state": ("string", "COMPLETE, PRUNED, FAIL, RUNNING or WAITING"),
        "value": ("float64", "validation loss; missing when it was not finite"),
        "diverged": ("boolean", "the loss was not finite, or ended above its start"),
        "steps": ("float64", "optimizer steps done"),
        "flops": ("float64", "floating point operations of the run"),
        "seconds": ("float64", "wall-clock time of the run"),
    },
    open=True,
)

REPEATS = Schema(
    "repeats",
    {
        "number": ("int64", "the trial's number in the study"),
        "seed": ("int64", "seed of weights and data order"),
        "loss": ("float64", "validation loss at the end; missing when it was not finite"),
        "diverged": ("boolean", "the loss was not finite, or ended above its start"),
        "flops": ("float64", "floating point operations of the run"),
        "seconds": ("float64", "wall-clock time of the run"),
    },
)

PARAMETERS = Schema(
    "parameters",
    {
        "name": ("string", "the parameter's name in the model"),
        "shape": ("string", "its shape at the target, as '4096x1024'"),
        "role": ("string", "input, vector, hidden, output, bottleneck or finite"),
        "m_in": ("float64", "fan-in / base fan-in"),
        "m_out": ("float64", "fan-out / base fan-out"),
        "init_std": ("float64", "standard deviation of the initial weights"),
        "lr": ("float64", "learning rate of its group"),
        "weight_decay": ("float64", "weight decay of its group, as torch takes it"),
        "eps": ("float64", "epsilon of its group; missing for optimizers without one"),
        "lr_factor": ("float64", "lr relative to the base model's"),
        "wd_factor": ("float64", "weight decay relative to the base model's"),
        "eps_factor": ("float64", "epsilon relative to the base model's; missing without one"),
        "init_factor": ("float64", "initial std relative to the base model's; missing for constants"),
    },
)


def varying(coordinates: pd.DataFrame) -> str:
    """Return the column along which a coordinates frame compares models: "depth" if that varies, else "width"."""
    return "depth" if coordinates["depth"].nunique() > 1 else "width"
