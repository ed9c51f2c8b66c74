"""Two real processes: replicated, sharded and tensor-parallel models train, and clip, as one process does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..helpers import trained

WORKER = Path(__file__).parents[1] / "helpers" / "distributed.py"
# Sums over two processes are taken in another order: a few units in the last of 16 digits, grown over five steps (seen
# at most 3e-15). float64's own rounding is the only difference there is.
REDUCED = 1e-12
OTHERS = ["DDP", "DDP(compile)", "compile(DDP)", "parallelize_module"]


def started(folder: Path, *names: str) -> list[dict[str, Any]]:
    """Return what the two processes report of ``names``."""
    processes = []
    for rank in range(2):
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, str(WORKER), str(rank), str(folder), *names]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(processes):
            process.wait(timeout=240)
            assert process.returncode == 0, (folder / f"{rank}.log").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for report in found:
        assert "error" not in report, report["error"]
    return found


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return started(tmp_path_factory.mktemp("sharded"), "fully_shard")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return started(tmp_path_factory.mktemp("others"), *OTHERS, "mup")


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[float], list[float]]:
    case = trained.transformer_case()
    model, norms = case.model(), list[float]()
    clip = trained.clipping(case.plan, norms)
    losses = trained.train(model, case.plan.make_optimizer(model), case.family.batch, clip=clip)
    assert case.plan.recipe.clip is not None
    assert max(norms) > case.plan.recipe.clip, "a norm that is never clipped tests no clipping"
    assert losses != pytest.approx(case.undisturbed, rel=1e-3)
    return losses, norms


def assert_as_one_process(reports: list[dict[str, Any]], wrapped: str, one: tuple[list[float], list[float]]) -> None:
    losses, norms = one
    for report in reports:  # settings in force are asserted inside the processes, before and after training
        assert trained.relative(report[wrapped]["losses"], losses) < REDUCED
        assert report[wrapped]["norms"] == pytest.approx(norms, rel=REDUCED)


@pytest.mark.extended
def test_losses_and_norms_of_a_sharded_model_are_those_of_one_process(
    sharded: list[dict[str, Any]], undisturbed: tuple[list[float], list[float]]
) -> None:
    assert_as_one_process(sharded, "fully_shard", undisturbed)
    assert sharded[0]["fully_shard"]["dtensors"] == len(trained.transformer_case().plan.rows)


@pytest.mark.extended
@pytest.mark.parametrize("wrapped", OTHERS)
def test_losses_and_norms_are_those_of_one_process(
    wrapped: str, others: list[dict[str, Any]], undisturbed: tuple[list[float], list[float]]
) -> None:
    assert_as_one_process(others, wrapped, undisturbed)


def test_a_sharded_run_resumes_from_its_distributed_state(
    sharded: list[dict[str, Any]], undisturbed: tuple[list[float], list[float]]
) -> None:
    """torch's distributed checkpoints name parameters instead of counting them; the settings are in them, audited."""
    for report in sharded:
        assert trained.relative(report["fully_shard"]["resumed"], undisturbed[0]) < REDUCED


@pytest.mark.extended
def test_the_wrappers_really_wrapped(others: list[dict[str, Any]]) -> None:
    first = {name: others[0][name]["names"][0] for name in OTHERS}
    assert first["DDP"] == "module.embedding.weight"
    assert first["DDP(compile)"] == "module._orig_mod.embedding.weight"
    assert first["compile(DDP)"] == "_orig_mod.module.embedding.weight"
    counts = {name: others[0][name]["dtensors"] for name in OTHERS}
    rows = len(trained.transformer_case().plan.rows)
    assert counts["DDP"] == 0 < counts["parallelize_module"] < rows  # plain and sharded gradients in one norm


@pytest.mark.extended
@pytest.mark.parametrize("operation", ["fully_shard", "parallelize_module"])
def test_mup_loses_its_scaling_there(operation: str, others: list[dict[str, Any]]) -> None:
    for report in others:
        assert "does not have `infshape` attribute" in report["mup"][operation]
