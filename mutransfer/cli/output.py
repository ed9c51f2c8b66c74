"""The output of every command's ``--json``: a model per command, from which docs/reference/json.md and its schemas are generated.

To add a key, add it here with its meaning, then run ``python -m mutransfer.cli.output`` to regenerate the documents. The
tests validate the output of every command against its model, in which unknown keys are an error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..io import write_json, write_text
from ..recipe import Recipe

__all__ = ["OUTPUTS", "Output", "schema", "write_documents"]

VERDICTS = "pass, fail or undecided; the exit code is 0 only for pass."
Verdict = Annotated[Literal["pass", "fail", "undecided"], Field(description=VERDICTS)]
PassOrFail = Annotated[Literal["pass", "fail"], Field(description="pass or fail; the exit code is 0 only for pass.")]
Role = Literal["input", "vector", "hidden", "output", "bottleneck", "finite"]
Number = float | None  # null if missing or not finite
Count = Annotated[int, Field(ge=0)]


class Output(BaseModel):
    """A JSON object without further keys, NaN or infinities."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Interval(Output):
    """A value with the ends of its 95% interval."""

    value: Number
    low: Number
    high: Number


class Price(Output):
    """Compute in floating point operations; unknown (null) with a user trainer, which chooses its own batches."""

    tuning_flops: Number = Field(description="All trials of the study, including pruned ones.")
    repeats_flops: Number = Field(
        description="Training of the best trials with other seeds; null if no repeats were requested."
    )
    verify_flops: Number = Field(
        description="All runs of the learning-rate basins, including those of the control parametrization."
    )
    target_flops: Number = Field(description="One run at the widest of the compared widths.")
    ratio: Number = Field(description="tuning_flops / target_flops.")
    uncounted: list[str] = Field(
        description="Operations that may cost something but are not included in any figure, because no formula is known."
    )


class Compared(Output):
    """Losses of one recipe at the widest width, over seeds, with 95% intervals (Student's t)."""

    label: str = Field(description="The parametrization, and where its hyperparameters came from.")
    log2_lr: float = Field(description="Base-2 logarithm of the learning rate.")
    loss: Number = Field(description="Mean over seeds, in nats; null if a run diverged.")
    low: Number
    high: Number
    seeds: Count
    difference: Number = Field(
        description="Loss minus the loss in the first row, paired by seed; null in the first row."
    )
    difference_low: Number
    difference_high: Number


class TunedControl(Output):
    """The control parametrization, tuned at the widest width, and the comparison with it."""

    parametrization: str
    trials: Count = Field(
        description="Finished trials of the control's search; 0 if only the learning rate was searched."
    )
    searched: list[str] = Field(description="Names of the hyperparameters that were searched.")
    params: dict[str, Any] = Field(description="Best values of the searched hyperparameters.")
    flops: Number = Field(
        description="Compute of the search, and of training the control's best recipe with several seeds."
    )
    conclusion: str = Field(description="The comparison, the difference and the cost of the search, in sentences.")


ByWidth = dict[str, dict[str, Interval]]
DRIFT = (
    "Octaves between the best learning rates at a width and at the proxy's width: parametrization → width → interval."
)
REGRET = (
    "How much worse the loss at a width is with the transferred learning rate than with the best one, in the loss's unit: "
    "parametrization → width → interval."
)


class Limits(Output):
    """The limits for drift and regret in a verdict."""

    drift_octaves: float
    regret: float = Field(description="In the loss's unit.")
    unit: str = Field(description="Unit of regret and losses: nats, or the unit of a user-defined loss.")


class Demo(Output):
    """`mutransfer demo`: the whole loop."""

    verdict: Verdict
    report: str = Field(description="Path of report.html.")
    drift_octaves: ByWidth = Field(description=DRIFT)
    regret: ByWidth = Field(description=REGRET)
    price: Price
    comparison: list[Compared]
    control: TunedControl | None
    coordinate_check: dict[str, Verdict] = Field(description="Parametrization → verdict of its coordinate check.")
    seconds: float


class Init(Output):
    """`mutransfer init`: a new experiment file."""

    path: str = Field(description="Path of the file.")


class Diagnosis(Output):
    """The result of one check."""

    name: str
    ok: bool = Field(description="False if something that mutransfer requires is broken.")
    detail: str
    fix: str | None = Field(description="The command or step that repairs or completes what was checked.")


class Doctor(Output):
    """`mutransfer doctor`: the installation and the machine."""

    checks: list[Diagnosis]
    verdict: PassOrFail


class ColumnMultiplier(Output):
    """Entries of an axis that a layer sums over; `Plan.attach` multiplies their input by ``multiplier``."""

    axis: int
    begin: int
    end: int
    multiplier: float
    gauge: float = Field(
        description="Factor by which these entries are larger, relative to the layer's other columns, than in the "
        "parametrization's paper, which keeps multipliers in the forward pass."
    )


class Parameter(Output):
    """Settings of one parameter; ``*_factor`` is relative to the base model's value."""

    name: str
    shape: list[int]
    role: Role
    m_in: float = Field(description="Fan-in / base fan-in.")
    m_out: float = Field(description="Fan-out / base fan-out.")
    init_std: Number = Field(description="Standard deviation of the initial weights.")
    lr: float
    weight_decay: float = Field(description="Weight decay, in the form that torch's optimizers take.")
    eps: Number = Field(description="Epsilon of the optimizer; null for optimizers without an epsilon.")
    lr_factor: float
    wd_factor: float
    eps_factor: Number
    init_factor: Number = Field(description="Factor on the standard deviation; null for constants.")
    columns: list[ColumnMultiplier] = Field(
        default=[],
        description="Columns for inputs of a fixed size, if other columns of the layer grow with the width; "
        "plan.attach(model) multiplies the inputs of the fixed columns. Absent if there are none.",
    )
    density: float = Field(default=1.0, description="Fraction of the weights that are not pruned. Absent if it is 1.")
    tangent: float = Field(
        default=1.0, description="Standard deviation of the tangents of a forward gradient. Absent if it is 1."
    )


class Group(Output):
    """One combination of settings, and the number of parameters that have it."""

    lr: float
    weight_decay: float
    eps: Number
    count: Count


class Grown(Output):
    """The fields of a transformers config that grow: field → [value at the base, value at the target]."""

    width: dict[str, list[Any]]
    depth: dict[str, list[Any]]
    head_dim: dict[str, list[Any]]


class Plan(Output):
    """`mutransfer plan`: the settings of every parameter."""

    parameters: list[Parameter]
    groups: list[Group]
    notes: list[str]
    fields: Grown | None = Field(default=None, description="Only for hf: models.")


class Slope(Output):
    """Growth of one statistic of one module with width (or depth)."""

    parametrization: str
    module: str = Field(
        description="Qualified name of the module; for update, step, gradient, decay and weight, name of the parameter."
    )
    role: str
    statistic: str = Field(description="activation, change, update, step, gradient, decay or weight.")
    step: Count = Field(description="Optimizer steps done.")
    slope: Number = Field(description="d log2(value) / d log2(width).")
    low: Number
    high: Number
    expected: str = Field(description="Healthy range of slopes (width-stable feature learning), as 'low..high'.")
    declared: str | None = Field(description="Range of slopes that the checked parametrization declares for itself.")
    ok: bool | None = Field(
        description="Whether the slope is in the healthy range, with a margin; null if the evidence is not sufficient."
    )


class Control(Output):
    """The second parametrization that was checked."""

    parametrization: str
    verdict: Verdict
    cause: str | None


class Check(Output):
    """`mutransfer check`: the coordinate check."""

    verdict: Verdict
    parametrization: str
    modules: list[Slope]
    cause: str | None = Field(description="What failed, or what is missing for a decision, in one sentence.")
    control: Control | None
    report: str | None = Field(description="Path of report.html, with --out.")


class Best(Output):
    """The best trial."""

    value: float = Field(description="Validation loss of the best trial; its mean over seeds with repeats.")
    params: dict[str, Any] = Field(description="Values of the searched hyperparameters in the best trial.")


class Default(Output):
    """The experiment's own recipe, which is the first trial."""

    value: Number = Field(description="Validation loss of this recipe; null if its trial is not complete.")


class Tune(Output):
    """`mutransfer tune`: the state of the study."""

    trials: Count = Field(description="All trials in the study, in any state.")
    finished: Count = Field(description="Trials that are complete or pruned.")
    diverged: Count
    pruned: Count
    best: Best
    default: Default
    seconds: float = Field(description="Duration of this call.")
    run: str = Field(description="Path of the run folder.")
    warnings: list[str]


class Verify(Output):
    """`mutransfer verify`: learning-rate basins across widths."""

    verdict: Verdict
    reasons: list[str] = Field(description="Sentences that explain the verdict.")
    widths: list[int]
    seeds: Count
    optimum_log2_lr: Number = Field(description="Best learning rate at the proxy's width, base-2 logarithm.")
    transferred_log2_lr: float = Field(description="The recipe's learning rate, base-2 logarithm.")
    drift_octaves: ByWidth = Field(description=DRIFT)
    regret: ByWidth = Field(description=REGRET)
    regret_relative: dict[str, dict[str, Number]] = Field(
        description="Regret divided by the best loss: parametrization → width → fraction; null if the loss is not positive."
    )
    regret_compute: dict[str, Interval | None] = Field(
        description="What the regret at the widest width is worth, as a fraction of the compute there: parametrization → "
        "interval; null if it cannot be computed, as with fewer than 3 widths or a loss that does not fall from each to the next."
    )
    limits: Limits
    flat_log2_lr: tuple[float, float] | None = Field(
        description="Ends (base-2 logarithms) of the range of learning rates whose regret is at most limits.regret at every "
        "width; null if the range spans less than limits.drift_octaves."
    )
    price: Price
    comparison: list[Compared]
    control: TunedControl | None


class Size(Output):
    """Sizes of a model and its run."""

    width: int
    depth: int
    batch: int | None = Field(description="Examples per step.")
    tokens: int | None = Field(description="Training examples (tokens for language models) of the whole run.")


class TargetParameter(Parameter):
    """Settings of one parameter of the target."""

    gauge: float = Field(
        description="Size of the parameter relative to its size in the parametrization's paper, which keeps multipliers in the "
        "forward pass. Gradient clipping needs it."
    )
    init: dict[str, Any] = Field(description="The initial distribution.")
    multiplier: float = Field(default=1.0, description="Multiplier that remains in the forward pass.")


class OptimizerSettings(Output):
    """The optimizer."""

    name: str
    torch_name: str | None = Field(description="Name of the optimizer's class.")
    settings: dict[str, Any] = Field(description="The settings that all parameters share.")


class Schedule(Output):
    """Learning rate over the run; warmup and cooldown are fractions of the run."""

    name: str
    warmup: float
    cooldown: float
    final: float = Field(description="Learning rate at the end, relative to its peak.")
    steps: int


class Transfer(Output):
    """`mutransfer transfer`: the target config, as it is also written to target.json."""

    format: str
    model: str
    options: dict[str, Any]
    data: str
    sequence_length: int
    scale: Size
    base: Size
    parametrization: str
    optimizer: OptimizerSettings
    recipe: Recipe
    parameters: list[TargetParameter]
    groups: list[Group]
    schedule: Schedule
    clip: Number = Field(description="Largest norm of the gradient.")
    batch_size: int
    steps: int
    tokens: int
    seed: int
    provenance: dict[str, Any] = Field(description="Origin of the recipe: proxy, study, hashes, versions.")
    warnings: list[str] = Field(description="Sentences about what does not, or may not, transfer.")
    notes: list[str]


class Train(Output):
    """`mutransfer train`: the run of the target."""

    verdict: PassOrFail
    loss: Number = Field(description="Validation loss; null if it diverged.")
    steps: Count = Field(description="Optimizer steps done.")
    tokens_per_second: Number = Field(
        description="Tokens (for images: examples) per second in this call; null if nothing was left to do, or with a user "
        "trainer."
    )
    checkpoint: str | None = Field(description="Path of the checkpoint; null if there is none, or with a user trainer.")


class Difference(Output):
    """One setting that differs from the plan."""

    name: str = Field(description="The parameter.")
    setting: str
    planned: Any
    found: Any


class Audit(Output):
    """`mutransfer audit`: the running optimizer compared with the plan."""

    verdict: PassOrFail
    differences: list[Difference]


class Report(Output):
    """`mutransfer report`: one page about a run folder."""

    report: str = Field(description="Path of report.html.")


OUTPUTS: dict[str, type[Output]] = {
    "demo": Demo, "init": Init, "doctor": Doctor, "plan": Plan, "check": Check, "tune": Tune, "verify": Verify,
    "transfer": Transfer, "train": Train, "audit": Audit, "report": Report,
}  # fmt: skip


def schema(command: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of what ``mutransfer COMMAND --json`` prints."""
    found = OUTPUTS[command].model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": f"mutransfer {command} --json"}


def write_documents(folder: Path) -> None:
    """Write json.md and schemas/COMMAND.json below ``folder``."""
    for command in OUTPUTS:
        write_json(folder / "schemas" / f"{command}.json", schema(command))
    write_text(folder / "json.md", _page())


HEAD = """\
# What `--json` prints

<!-- Written by `python -m mutransfer.cli.output`. -->

With `--json`, a command writes one line with one JSON object to standard output, and nothing else. Without `--json`, it writes
its result as text. Progress, warnings and everything that the model, the data or a library prints go to standard error, in
whatever way it is printed. Output that the model repeats each time it is built is shown once. After an invalid request (exit
code 2), a bug (3) or Ctrl-C (130), standard output is empty. JSON has no NaN and no infinity, so both are written as `null`.

Paths are written as you gave them, or start with a folder that you gave. The table of each section is generated from the JSON
Schema to which the section links.
"""


def _page() -> str:
    return "\n".join([HEAD, *(_section(command) for command in OUTPUTS)])


def _section(command: str) -> str:
    found = schema(command)
    definitions = found.get("$defs", {})
    lines = [f"## {command}", "", f"{_sentence(found)} Schema: [{command}.json](schemas/{command}.json).", ""]
    lines += ["| key | type | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | {kind} | {meaning} |" for key, kind, meaning in _rows(found, definitions, "")]
    return "\n".join([*lines, ""])


def _rows(found: dict[str, Any], definitions: dict[str, Any], before: str) -> list[tuple[str, str, str]]:
    rows = []
    for key, value in found["properties"].items():
        inner, kind, path = _unfolded(value, definitions)
        optional = "" if key in found.get("required", ()) else " May be missing."
        meaning = value.get("description", "") or (inner or {}).get("description", "")
        name = f"{before}{key}"
        rows.append((name, kind, (" ".join(meaning.split()) + optional).strip()))
        if inner is not None and inner.get("title") != "Recipe":
            rows += _rows(inner, definitions, f"{name}{path}.")
    return rows


def _unfolded(value: dict[str, Any], definitions: dict[str, Any]) -> tuple[dict[str, Any] | None, str, str]:
    """Return the object inside a value (None if there is none), the type in words, and the path from the key to the object."""
    if "$ref" in value:
        return definitions[value["$ref"].rpartition("/")[2]], "object", ""
    if "anyOf" in value:
        parts = [_unfolded(each, definitions) for each in value["anyOf"]]
        leads, _, path = next((part for part in parts if part[0] is not None), (None, "", ""))
        return leads, " or ".join(part[1] for part in parts), path
    if "enum" in value:
        return None, " or ".join(f"`{each}`" for each in value["enum"]), ""
    if value.get("type") == "array":
        item, kind, path = _unfolded(value.get("items", {}), definitions)
        return item, f"list of {kind}", f"[]{path}"
    if value.get("type") == "object":
        more = value.get("additionalProperties")
        entry, kind, path = _unfolded(more if isinstance(more, dict) else {}, definitions)
        return entry, f"object of {kind}", f".*{path}"
    return None, value.get("type", "any"), ""


def _sentence(found: dict[str, Any]) -> str:
    return " ".join(found["description"].split())


if __name__ == "__main__":
    write_documents(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference"))
