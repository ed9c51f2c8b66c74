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
    """Compute in floating point operations; null if a user trainer chooses its batches."""

    tuning_flops: Number = Field(description="All trials of the study, including pruned ones.")
    repeats_flops: Number = Field(
        description="The best trials retrained with other seeds; null if none were requested."
    )
    verify_flops: Number = Field(description="All runs of the basins, including the control's.")
    target_flops: Number = Field(description="One run at the widest width compared.")
    ratio: Number = Field(description="tuning_flops / target_flops.")
    uncounted: list[str] = Field(
        description="Operations that may cost something but are not included in any figure, because no formula is known."
    )


class Compared(Output):
    """Losses of one recipe at the widest width, over seeds, with 95% intervals (Student's t)."""

    label: str = Field(description="Parametrization, and where its hyperparameters came from.")
    log2_lr: float = Field(description="Base-2 logarithm of the learning rate.")
    loss: Number = Field(description="Mean over seeds, in nats; null if a run diverged.")
    low: Number
    high: Number
    seeds: Count
    difference: Number = Field(description="Loss minus the first row's, paired by seed; null in the first row.")
    difference_low: Number
    difference_high: Number


class TunedControl(Output):
    """The control as tuned at the widest width, and the comparison with it."""

    parametrization: str
    trials: Count = Field(description="Finished trials of its search; 0 if only its learning rate was searched.")
    searched: list[str]
    params: dict[str, Any] = Field(description="Its best values of the searched hyperparameters.")
    flops: Number = Field(description="Compute of its search and of its best recipe over seeds.")
    conclusion: str = Field(description="The comparison, the difference and the cost of the search, in sentences.")


ByWidth = dict[str, dict[str, Interval]]
DRIFT = (
    "Octaves between the best learning rates at a width and at the proxy's width: parametrization → width → interval."
)
REGRET = "Cost of the transferred learning rate at a width, in the loss's unit: parametrization → width → interval."


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
    ok: bool = Field(description="False if a required part is broken.")
    detail: str
    fix: str | None = Field(description="The command or step that repairs or completes it.")


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
        description="Their size relative to the layer's other columns, compared with the source's own rescaling."
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
    weight_decay: float = Field(description="As torch takes it.")
    eps: Number = Field(description="null for optimizers without one.")
    lr_factor: float
    wd_factor: float
    eps_factor: Number
    init_factor: Number = Field(description="null for constants.")
    columns: list[ColumnMultiplier] = Field(
        default=[],
        description="Fixed columns next to growing ones, which plan.attach(model) multiplies; absent if there are none.",
    )


class Group(Output):
    """One distinct setting, and the number of parameters that share it."""

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
    module: str = Field(description="Module's qualified name, or a parameter's for gradient, decay and weight.")
    role: str
    statistic: str = Field(description="activation, change, update, step, gradient, decay or weight.")
    step: Count = Field(description="Optimizer steps done.")
    slope: Number = Field(description="d log2(value) / d log2(width).")
    low: Number
    high: Number
    expected: str = Field(description="Slopes of width-stable feature learning, as 'low..high'.")
    declared: str | None = Field(description="Slopes that the parametrization in force declares.")
    ok: bool | None = Field(description="null if the evidence is not sufficient.")


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

    value: float = Field(description="Its validation loss.")
    params: dict[str, Any] = Field(description="Its searched hyperparameters.")


class Default(Output):
    """The recipe of the experiment, which is the first trial."""

    value: Number = Field(description="Its validation loss; null if it did not finish.")


class Tune(Output):
    """`mutransfer tune`: the state of the study."""

    trials: Count = Field(description="All trials in the study, in any state.")
    finished: Count = Field(description="Complete or pruned.")
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
        description="Regret / best loss: parametrization → width → fraction; null if the loss is not positive."
    )
    regret_compute: dict[str, Interval | None] = Field(
        description="Fraction of the compute at the widest width that its regret is worth, by parametrization; null if "
        "fewer than 3 widths have a loss that falls."
    )
    limits: Limits
    flat_log2_lr: tuple[float, float] | None = Field(
        description="Ends of the range of learning rates that cost no more than the limit at every width; null if it spans less "
        "than limits.drift_octaves."
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

    gauge: float = Field(description="Its size relative to the same parameter in the source's own rescaling.")
    init: dict[str, Any] = Field(description="The initial distribution.")
    multiplier: float = Field(default=1.0, description="Multiplier that remains in the forward pass.")


class OptimizerSettings(Output):
    """The optimizer."""

    name: str
    torch_name: str | None = Field(description="Its class in torch.optim.")
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
        description="Speed of this call (images: examples); null if nothing was left to do, or with a user trainer."
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

With `--json` a command writes one line with one JSON object to standard output, and nothing else; without it, its result as text.
Progress, warnings and everything that the model, the data or a library prints go to standard error, whichever way they print, and
output that the model repeats each time it is built is shown once. An invalid request (exit code 2), a bug (3) and Ctrl-C (130)
leave standard output empty. JSON has no NaN and no infinity: both are written as `null`.

Paths are written as they were given, or start with a folder that was given. The tables are generated from the JSON Schemas that
each section links to.
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
