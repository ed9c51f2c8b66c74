"""What every command's ``--json`` holds: a model per command, from which docs/json.md and docs/schemas are written.

A key is added here with its meaning, then ``python -m mutransfer.cli.output docs`` writes the documents anew; the tests hold
whatever a command prints against its model, in which a key that does not stand here is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..io import write_json, write_text
from ..recipe import Recipe

__all__ = ["OUTPUTS", "Output", "schema", "write_documents"]

VERDICTS = "pass, fail or undecided; the exit code is 0 for pass alone."
Verdict = Annotated[Literal["pass", "fail", "undecided"], Field(description=VERDICTS)]
PassOrFail = Annotated[Literal["pass", "fail"], Field(description="pass or fail; the exit code is 0 for pass alone.")]
Role = Literal["input", "vector", "hidden", "output", "bottleneck", "finite"]
Number = float | None  # null where there is none, or where it is not finite
Count = Annotated[int, Field(ge=0)]


class Output(BaseModel):
    """One JSON object: no key but these, no NaN and no infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Interval(Output):
    """A value with the ends of its 95% interval."""

    value: Number
    low: Number
    high: Number


class Price(Output):
    """Compute, in floating point operations; null where a trainer of your own chooses its batches."""

    tuning_flops: Number = Field(description="Of all trials of the study, pruned ones too.")
    repeats_flops: Number = Field(
        description="Of the best trials trained again with other seeds; null where none were asked for."
    )
    verify_flops: Number = Field(description="Of all runs of the basins, the control's too.")
    target_flops: Number = Field(description="Of one run at the widest width compared.")
    ratio: Number = Field(description="tuning_flops / target_flops.")
    uncounted: list[str] = Field(
        description="Operations that may be work and that no figure includes, as no formula is known."
    )


class Compared(Output):
    """Losses of one recipe at the widest width, over seeds; intervals are 95% ones (Student's t)."""

    label: str = Field(description="Parametrization, and where its hyperparameters came from.")
    log2_lr: float = Field(description="Base-2 logarithm of the learning rate.")
    loss: Number = Field(description="Mean over seeds, in nats; null where a run diverged.")
    low: Number
    high: Number
    seeds: Count
    difference: Number = Field(description="Loss minus the first row's, paired by seed; null in the first row.")
    difference_low: Number
    difference_high: Number


class TunedControl(Output):
    """The control as tuned at the widest width, and what it was compared with."""

    parametrization: str
    trials: Count = Field(description="Finished trials of its search; 0 where its learning rate alone was searched.")
    searched: list[str]
    params: dict[str, Any] = Field(description="Its best values of what was searched.")
    flops: Number = Field(description="Of its search and of its best recipe over seeds.")
    conclusion: str = Field(description="What was compared, the difference, and what the search cost, in sentences.")


ByWidth = dict[str, dict[str, Interval]]
DRIFT = "Octaves between the best learning rate at a width and at the proxy's: parametrization → width → interval."
REGRET = "What the transferred learning rate costs at a width, in the loss's unit: parametrization → width → interval."


class Limits(Output):
    """What a verdict holds drift and regret against."""

    drift_octaves: float
    regret: float = Field(description="In the loss's unit.")
    unit: str = Field(description="Of regret and losses: nats, or the unit of a loss of your own.")


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
    """One thing that was looked at."""

    name: str
    ok: bool = Field(description="Nothing needed is broken.")
    detail: str
    fix: str | None = Field(description="The command or step that mends or completes it.")


class Doctor(Output):
    """`mutransfer doctor`: the installation and the machine."""

    checks: list[Diagnosis]
    verdict: PassOrFail


class ColumnMultiplier(Output):
    """Entries of an axis that a layer sums over, which `Plan.attach` lets its input enter ``multiplier`` times as large."""

    axis: int
    begin: int
    end: int
    multiplier: float
    gauge: float = Field(
        description="Their size against the layer's other columns, relative to the source's own rescaling."
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
        description="Fixed columns beside growing ones, which plan.attach(model) multiplies; absent where there are none.",
    )


class Group(Output):
    """One distinct setting, and how many parameters share it."""

    lr: float
    weight_decay: float
    eps: Number
    count: Count


class Grown(Output):
    """What grows in a transformers config: field → [at the base, at the target]."""

    width: dict[str, list[Any]]
    depth: dict[str, list[Any]]
    head_dim: dict[str, list[Any]]


class Plan(Output):
    """`mutransfer plan`: settings per parameter."""

    parameters: list[Parameter]
    groups: list[Group]
    notes: list[str]
    fields: Grown | None = Field(default=None, description="Of hf: models alone.")


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
    ok: bool | None = Field(description="null where the evidence does not tell.")


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
    cause: str | None = Field(description="What failed, or what is missing for a decision, in a sentence.")
    control: Control | None
    report: str | None = Field(description="Path of report.html, with --out.")


class Best(Output):
    """The best trial."""

    value: float = Field(description="Its validation loss.")
    params: dict[str, Any] = Field(description="Its searched hyperparameters.")


class Default(Output):
    """The experiment's own recipe, the first trial."""

    value: Number = Field(description="Its validation loss; null if it did not finish.")


class Tune(Output):
    """`mutransfer tune`: the study so far."""

    trials: Count = Field(description="Trials in the study, whatever became of them.")
    finished: Count = Field(description="Complete or pruned.")
    diverged: Count
    pruned: Count
    best: Best
    default: Default
    seconds: float = Field(description="Of this call.")
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
        description="Regret over the best loss: parametrization → width → fraction; null where the loss is not positive."
    )
    regret_compute: dict[str, Interval | None] = Field(
        description="Fraction of the compute at the widest width that its regret is worth, by parametrization; null where "
        "fewer than 3 widths have a loss that falls."
    )
    limits: Limits
    flat_log2_lr: tuple[float, float] | None = Field(
        description="Ends of the learning rates that cost no more than the limit at every width; null if they span less than "
        "limits.drift_octaves."
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
    multiplier: float = Field(default=1.0, description="What is left in the forward pass.")


class OptimizerSettings(Output):
    """The optimizer."""

    name: str
    torch_name: str | None = Field(description="Its class in torch.optim.")
    settings: dict[str, Any] = Field(description="What all parameters share.")


class Schedule(Output):
    """Learning rate over the run; warmup and cooldown as fractions of it."""

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
    provenance: dict[str, Any] = Field(description="Where the recipe came from: proxy, study, hashes, versions.")
    warnings: list[str] = Field(description="What does not, or may not, transfer.")
    notes: list[str]


class Train(Output):
    """`mutransfer train`: the big run."""

    verdict: PassOrFail
    loss: Number = Field(description="Validation loss; null if it diverged.")
    steps: Count = Field(description="Optimizer steps done.")
    tokens_per_second: Number = Field(
        description="Of this call (images: examples); null if nothing was left to do, and with a trainer of your own."
    )
    checkpoint: str | None = Field(
        description="Path of the checkpoint; null if there is none, and with a trainer of your own."
    )


class Difference(Output):
    """One setting that is not as planned."""

    name: str = Field(description="The parameter.")
    setting: str
    planned: Any
    found: Any


class Audit(Output):
    """`mutransfer audit`: the live optimizer against the plan."""

    verdict: PassOrFail
    differences: list[Difference]


class Report(Output):
    """`mutransfer report`: one page of a run folder."""

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

<!-- Written by `python -m mutransfer.cli.output docs`. -->

With `--json` a command writes one line to standard output, one JSON object, and nothing else; without it, its result as text.
Progress, warnings and whatever the model, the data or a library prints go to standard error, however they print it, and what
the model prints each time that it is built is shown once. A request that is wrong (exit code 2), a bug (3) and Ctrl-C (130) leave
standard output empty. JSON has no NaN and no infinity: `null` stands for both.

Paths are as they were given, or below a folder that was. The tables are those of the schemas in [schemas](schemas).
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
    """Return the object that a key leads to (None if it is none), the type in words, and the path from the key to the object."""
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
    write_documents(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
