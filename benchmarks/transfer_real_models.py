"""Does the learning rate transfer on models that nobody here wrote: transformers' Llama and GPT-2, over width and depth.

Every run is written down as it ends, so that an interrupted script goes on where it was. Basins are extended until the
optimum has two points on either side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from harness import Claim, publish

import mutransfer as mt
from mutransfer.basins import optima
from mutransfer.proxies.data import load_data
from mutransfer.proxies.load import load_family
from mutransfer.proxies.training import Training, train
from mutransfer.schemas import BASINS
from mutransfer.tracing.observe import observe

# Initial weights of 0.1 are those of the fan-in at width 64. With transformers' default of 0.02 a run of 100 steps ends while
# the model is still leaving its start, and the loss varies by 0.1 to 0.2 between seeds.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
        "max_position_embeddings": 128, "tie_word_embeddings": False, "initializer_range": 0.1,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256,
        "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0,
        "initializer_range": 0.1,
    },
}  # fmt: skip
REACH = 2


def basins(
    model: str, axis: str, sizes: Sequence[int], names: Sequence[str], given: argparse.Namespace, done: dict[Any, Any]
) -> pd.DataFrame:
    """Train over a grid of learning rates; depth sits in the column ``width`` where that is the axis."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(CONFIGS[model]), encoding="utf-8")
        data = load_data("bytes", given.length)
        family = load_family(f"hf:{path}", data, None, batch_size=given.batch)
        seen = observe(family)
        for name in names:
            for size in sizes:
                while missing := _missing(done, (model, axis, name, size), given.seeds):
                    for k, seed in missing:
                        scale = family.base.with_(**{axis: size})
                        recipe = mt.Recipe(lr=2.0**k, warmup=0.1, schedule="linear")
                        plan = mt.plan(family, scale, name, "adamw", recipe, observation=seen)
                        run = Training(family, plan, data, steps=given.steps, batch_size=given.batch, seed=seed)
                        outcome = train(run)
                        row = (model, axis, name, size, k, seed)
                        done[row] = outcome.loss if not outcome.diverged else math.inf
                        print(*row, f"{outcome.loss:.4f} ({outcome.seconds:.0f} s)", flush=True)
                        with given.out.open("a", encoding="utf-8") as file:
                            print(*row, done[row], sep=",", file=file)
    rows = [
        {"parametrization": name, "width": size, "depth": size, "seed": seed, "log2_lr": k, "loss": loss,
         "diverged": math.isinf(loss), "flops": 0.0, "seconds": 0.0}
        for (m, a, name, size, k, seed), loss in done.items() if (m, a) == (model, axis) and seed < given.seeds
    ]  # fmt: skip
    return BASINS.frame(rows)


def _missing(done: dict[Any, Any], key: tuple[str, str, str, int], seeds: int) -> list[tuple[int, int]]:
    known: dict[int, list[float]] = {}
    for (*head, k, _), loss in done.items():
        if tuple(head) == key:
            known.setdefault(k, []).append(loss)
    points = set(range(-8, -3)) | set(known)
    if all(len(known.get(k, [])) >= seeds for k in points):
        best = min(points, key=lambda k: sum(known[k]) / len(known[k]))
        points |= set(range(best - REACH, best + REACH + 1))
    have = {(k, seed) for (*head, k, seed) in done if tuple(head) == key}
    return [(k, seed) for k in sorted(points) for seed in range(seeds) if (k, seed) not in have]


def drift(model: str, axis: str, name: str, table: pd.DataFrame, bar: float, least: bool = False) -> Claim:
    """Return the claim about the optimum's drift between the smallest and the largest size."""
    last = table[table["parametrization"] == name].iloc[-1]
    value, ends = abs(last["drift"]), sorted(abs(last[f"drift_{end}"]) for end in ("low", "high"))
    ok = value >= bar if least else value <= bar
    sign = "at least" if least else "at most"
    return Claim(f"{model} {axis} {name}: |drift| in octaves, {sign}", value, *ends, bar, bool(ok))


def main() -> None:
    """Run what is missing, print the optima and the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="does it run: two sizes, few steps, one seed")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer_real_models.csv"))
    parser.add_argument("--only", choices=["width", "depth"])
    parser.add_argument("--models", nargs="+", default=list(CONFIGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.steps, given.batch, given.out = 1, 4, 2, Path(tempfile.mkdtemp()) / "quick.csv"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[Any, Any] = {}
    if given.out.exists():
        for line in given.out.read_text(encoding="utf-8").splitlines():
            model, axis, name, size, k, seed, loss = line.split(",")
            done[model, axis, name, int(size), int(k), int(seed)] = float(loss)
    claims: list[Claim] = []
    widths, depths = ((64, 128), (2, 4)) if given.quick else ((64, 256), (2, 8, 16))
    for model in given.models:
        if given.only != "depth":
            table = optima(basins(model, "width", widths, ("mup", "sp"), given, done))
            print(table.to_string(), flush=True)
            claims += [drift(model, "width", "mup", table, 0.5), drift(model, "width", "sp", table, 1.5, least=True)]
        if given.only != "width" and model == "llama":
            frame = basins(model, "depth", depths, ("completep", "mup"), given, done)
            table = optima(frame).rename(columns={"width": "depth"})
            print(table.to_string(), flush=True)
            claims.append(drift(model, "depth", "completep", table, 0.5))
            best = table[table["parametrization"] == "completep"]["best_loss"].to_list()
            falls = max(b - a for a, b in itertools.pairwise(best))
            claims.append(
                Claim(f"{model} depth completep: best loss's largest rise", falls, falls, falls, 0.0, falls < 0)
            )
    publish(claims, given.json)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
