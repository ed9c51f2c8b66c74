"""What it takes to plan a model of a trillion parameters: seconds and memory, in a fresh process each time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Claim, arguments, at_most, publish

# The first is dense, the second a mixture of experts with latent attention; both have 1.0 to 1.2 · 10¹² parameters.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 25600, "intermediate_size": 69120,
        "num_hidden_layers": 146, "num_attention_heads": 200, "num_key_value_heads": 40, "vocab_size": 128256,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "initializer_range": 0.006,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64,
        "num_key_value_heads": 64, "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163840, "initializer_range": 0.006,
    },
}  # fmt: skip

# What the process imports before the clock of the plan starts: torch, transformers and the model's own file.
CODE = """
import importlib, json, resource, sys, time
started = time.perf_counter()
from mutransfer.proxies import huggingface
import mutransfer as mt, mutransfer.planning.build
from mutransfer.proxies.load import load_family
path, kind = sys.argv[1:]
sys.modules.setdefault("torchvision", None)
importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
importlib.import_module("transformers.models.auto.modeling_auto")
imported = time.perf_counter()
family = load_family("hf:" + path, None, None)
plan = mt.plan(family, family.base)
done = time.perf_counter()
stds = sorted({row.init.std for row in plan.rows if row.role == "hidden"})
count = sum(__import__("math").prod(row.shape) for row in plan.rows)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([done - imported, done - started, memory, count, stds]))
"""


def measure(kind: str, repeats: int) -> list[Claim]:
    """Plan one config ``repeats`` times."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(CONFIGS[kind]), encoding="utf-8")
        command = [sys.executable, "-c", CODE, str(path), kind]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)]
    seconds, total, memory, count, stds = zip(*runs, strict=True)
    assert count[0] >= 1e12, count
    assert stds[0] == [CONFIGS[kind]["initializer_range"]], stds[0]
    name = f"{kind}, {count[0] / 1e12:.2f}e12 parameters"
    return [
        at_most(f"{name}: seconds after imports", list(seconds), 5.0),
        at_most(f"{name}: seconds in all", list(total), 8.0),
        at_most(f"{name}: peak memory, GiB", list(memory), 1.4),  # 1.5 GB
    ]


if __name__ == "__main__":
    given = arguments(__doc__ or "")
    publish([claim for kind in CONFIGS for claim in measure(kind, 1 if given.quick else 5)], given.json)
