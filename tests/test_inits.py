"""What a constructor does is seen and can be done again: at any size, from a saved plan, and on any shard."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.inits import Init, InitWatcher, draw_
from mutransfer.inits.replay import Program

from . import families

N = 64


def seen(build: Callable[[], torch.Tensor]) -> Init | str:
    """What the watcher says of a tensor that ``build`` makes."""
    with FakeTensorMode(allow_non_fake_inputs=True), InitWatcher() as watcher:
        tensor = build()
    return watcher.find(tensor)


def saved(init: Init | str) -> Init:
    """The initialization after a trip through a file."""
    assert isinstance(init, Init), init
    return Init.from_dict(json.loads(json.dumps(init.as_dict(), allow_nan=False)))


def drawn(init: Init, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    tensor = torch.full(shape, math.nan)
    draw_(tensor, init, seed, "it")
    return tensor


def old_trunc_normal(mean: float, std: float, a: float, b: float) -> torch.Tensor:
    """`trunc_normal_` as torch had it until 2.12."""
    low, high = ((1 + math.erf((bound - mean) / std / math.sqrt(2))) / 2 for bound in (a, b))
    tensor = torch.empty(N).uniform_(2 * low - 1, 2 * high - 1).erfinv_()
    return tensor.mul_(std * math.sqrt(2)).add_(mean).clamp_(min=a, max=b)


RECOGNIZED: dict[str, tuple[Callable[[int], torch.Tensor], Init]] = {
    "normal_": (lambda n: torch.empty(n).normal_(0.5, 0.02), Init("normal", 0.5, 0.02)),
    "empty, normal_": (lambda n: torch.empty(n).normal_(), Init("normal", 0, 1)),
    "nn.init.normal_": (lambda n: nn.init.normal_(torch.zeros(n), std=0.02), Init("normal", 0, 0.02)),
    "torch.normal": (lambda n: torch.normal(0.1, 0.3, (n,)), Init("normal", 0.1, 0.3)),
    "torch.normal of tensors": (lambda n: torch.normal(torch.ones(n), 0.3), Init("normal", 1, 0.3)),
    "uniform_": (lambda n: nn.init.uniform_(torch.empty(n), -0.1, 0.3), Init("uniform", -0.1, 0.3)),
    "randn * s": (lambda n: torch.randn(n) * 0.02, Init("normal", 0, 0.02)),
    "s * randn": (lambda n: 0.02 * torch.randn(n), Init("normal", 0, 0.02)),
    "tensor * randn": (lambda n: torch.tensor(0.25) * torch.randn(n) + torch.ones(n), Init("normal", 1, 0.25)),
    "randn / s": (lambda n: torch.randn(n) / 4, Init("normal", 0, 0.25)),
    "s - randn": (lambda n: 1 - 2 * torch.randn(n), Init("normal", 1, 2)),
    "s - rand": (lambda n: 1 - torch.rand(n), Init("uniform", 0, 1)),
    "-s * randn": (lambda n: -0.5 * torch.randn(n), Init("normal", 0, 0.5)),
    "-s * rand": (lambda n: -0.5 * torch.rand(n), Init("uniform", -0.5, 0)),
    "shifted rand": (lambda n: (torch.rand(n) - 0.5) * 2, Init("uniform", -1, 1)),
    "alpha": (lambda n: torch.randn(n).add_(torch.ones(n), alpha=3), Init("normal", 3, 1)),
    "mul_ in place": (lambda n: torch.randn(n).mul_(3), Init("normal", 0, 3)),
    "kaiming_normal_": (lambda n: nn.init.kaiming_normal_(torch.empty(n, 8))[:, 0].clone(), Init("normal", 0, 0.5)),
    "a clamp that clips nothing": (
        lambda n: (torch.randn(n) / 9).clamp(-1, 1),
        Init("trunc_normal", 0, 1 / 9, -1, 1),
    ),
    "trunc_normal_": (
        lambda n: nn.init.trunc_normal_(torch.empty(n), std=0.02, a=-0.01, b=0.03125),
        Init("trunc_normal", 0, 0.02, -0.01, 0.03125),
    ),
    "trunc_normal_, far bounds": (
        lambda n: nn.init.trunc_normal_(torch.empty(n), std=0.02),
        Init("trunc_normal", 0, 0.02, -0.8, 0.8),
    ),
    "trunc_normal_, near bounds": (
        lambda n: nn.init.trunc_normal_(torch.empty(n), mean=0.1, std=2, a=-0.25, b=0.25),
        Init("trunc_normal", 0.1, 2, -0.25, 0.25),
    ),
    "trunc_normal_, copied to bfloat16": (
        lambda n: nn.init.trunc_normal_(torch.empty(n, dtype=torch.bfloat16).float()).to(torch.bfloat16),
        Init("trunc_normal", 0, 1, -2, 2),
    ),
    "trunc_normal_, scaled": (
        lambda n: nn.init.trunc_normal_(torch.empty(n), a=-1).mul_(-0.5),
        Init("trunc_normal", 0, 0.5, -1, 0.5),
    ),
    "zeros": (torch.zeros, Init("constant", 0)),
    "ones": (torch.ones, Init("constant", 1)),
    "full": (lambda n: torch.full((n,), 0.1), Init("constant", 0.1)),
    "ones * s": (lambda n: torch.ones(n) * 1e-4, Init("constant", 1e-4)),
    "a function of a constant": (lambda n: torch.full((n,), 4.0).sqrt_().neg(), Init("constant", -2)),
    "padded": (lambda n: nn.functional.pad(torch.zeros(n - 1), (0, 1)), Init("constant", 0)),
    "torch.tensor": (lambda n: torch.tensor(3.0).expand(n).clone(), Init("constant", 3)),
    "numpy": (lambda n: torch.from_numpy(np.full(n, 3.0)), Init("constant", 3)),
    "fill_": (lambda n: torch.randn(n).fill_(2), Init("constant", 2)),
    "zero_": (lambda n: torch.randn(n).zero_(), Init("constant", 0)),
    "copied": (lambda n: torch.empty(n).copy_(torch.randn(n)), Init("normal", 0, 1)),
    "another dtype": (lambda n: torch.randn(n, dtype=torch.float64).float(), Init("normal", 0, 1)),
    "a slice of a stack": (lambda n: torch.randn(3, n)[1], Init("normal", 0, 1)),
    "all slices": (lambda n: torch.stack([torch.zeros(n)] * 2).normal_()[0], Init("normal", 0, 1)),
}


@pytest.mark.parametrize("way", RECOGNIZED)
def test_a_distribution_is_recognized_and_drawn(way: str) -> None:
    draw, expected = RECOGNIZED[way]
    found = saved(seen(lambda: draw(N)))
    assert (found.kind, found.parts, found.program) == (expected.kind, (), None)
    numbers = [(init.a, init.b, init.low, init.high) for init in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-8)
    own, again = draw(20_000).double(), drawn(found, (20_000,))
    assert found.std == pytest.approx(own.std().item(), rel=0.03, abs=1e-6)
    assert again.std().item() == pytest.approx(own.std().item(), rel=0.03, abs=1e-6)
    assert again.mean().item() == pytest.approx(own.mean().item(), abs=0.05 * expected.std + 1e-6)
    assert own.amin().item() == pytest.approx(again.amin().item(), abs=1.5 * expected.std + 1e-9)


@pytest.mark.parametrize(
    ("mean", "std", "a", "b"), [(0.0, 1.0, -2.0, 2.0), (0.01, 0.02, -2.0, 2.0), (1.0, 2.0, 1.0, 2.0)]
)
def test_the_truncated_normal_of_older_torch(mean: float, std: float, a: float, b: float) -> None:
    found = seen(lambda: old_trunc_normal(mean, std, a, b))
    expected = Init.truncated(mean, std, a, b)
    assert isinstance(found, Init)
    assert (found.a, found.b, found.low, found.high) == pytest.approx(
        (mean, std, expected.low, expected.high), rel=1e-6
    )


@pytest.mark.parametrize(("a", "b"), [(-2, 2), (-0.5, 3), (1, 2), (6, 7), (-7, -6), (-40, 40)])
def test_the_std_of_a_truncated_normal_is_scipys(a: float, b: float) -> None:
    from scipy.stats import truncnorm

    assert Init.truncated(3.0, 2.0, 3 + 2 * a, 3 + 2 * b).std == pytest.approx(2 * truncnorm(a, b).std(), rel=1e-4)


def inverse_softplus() -> torch.Tensor:
    """Mamba's bias of its time step."""
    dt = torch.exp(torch.rand(N) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def forgetting() -> torch.Tensor:
    bias = torch.zeros(4 * N)
    bias[N : 2 * N] = 1
    return bias


def halves() -> torch.Tensor:
    weight = nn.Parameter(torch.empty(3, 2 * N, N))
    with torch.no_grad():
        for part, std in zip(weight.chunk(2, dim=1), (0.1, 0.5), strict=True):
            part.normal_(std=std)
    return weight


def overlapping() -> torch.Tensor:
    weight = torch.zeros(N, N)
    weight[:8].normal_()
    weight[4:12] *= 3
    return weight


def double_precision() -> torch.Tensor:
    """Built under another default type than it is drawn again under; a third of the way float32 would not reach 0."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return (torch.linspace(0, 1, N) - 1 / 3).float()
    finally:
        torch.set_default_dtype(before)


def mixed() -> torch.Tensor:
    weight = torch.randn(N, N)
    weight[::3] *= 2
    weight[:, 5].zero_()
    weight[7, 9:11] = torch.tensor([3.0, 4.0])
    return weight


def onto_itself() -> torch.Tensor:
    table = torch.arange(9.0).view(3, 3)
    return table.copy_(table.expand(3, 3))


TABLES: dict[str, Callable[[], torch.Tensor]] = {
    "linspace": lambda: torch.linspace(0, 1, N),
    "state space": lambda: torch.log(torch.arange(1, 17).float().repeat(N, 1)),
    "literal": lambda: torch.tensor([3.0, 4.0, -math.inf]),
    "numpy": lambda: torch.from_numpy(np.arange(6.0).reshape(2, 3)).float(),
    "eye_": lambda: nn.init.eye_(torch.empty(4, 6)),
    "dirac_": lambda: nn.init.dirac_(torch.empty(80, 80, 3)),
    "few dirac_": lambda: nn.init.dirac_(torch.empty(4, 4, 3)),
    "a constant in parts": forgetting,
    "onto itself": onto_itself,
    "double precision": double_precision,
    "strided": lambda: torch.arange(N).float().view(8, 8).t(),
    "sliced": lambda: torch.arange(N).float().view(8, 8)[1:3, ::2],
    "a value asked for": lambda: torch.zeros(3) + torch.linspace(0, 1, 5)[2].item(),
}
RANDOM: dict[str, Callable[[], torch.Tensor]] = {
    "inverse softplus": inverse_softplus,
    "orthogonal_": lambda: nn.init.orthogonal_(torch.empty(N, 2 * N), gain=3),
    "sparse_": lambda: nn.init.sparse_(torch.empty(N, N), 0.5, std=0.1),
    "clamped": lambda: torch.randn(N, N).clamp(-1, 1),
    "a table of stds": lambda: torch.randn(N, N) * torch.linspace(0, 1, N),
    "repeated": lambda: torch.randn(1, N).expand(N, N).clone(),
    "stacked": lambda: torch.cat([torch.randn(N, N), torch.zeros(N, N)]),
    "_foreach": lambda: torch._foreach_mul([torch.randn(N, N)], 2.0)[0],
    "default type": lambda: torch.randn(N, N).double() ** 3,
    "mixed": mixed,
    "overlapping": overlapping,
    "halves": halves,
    "a row": lambda: nn.Embedding(N, N, padding_idx=3).weight,
    "a truncated slice": lambda: nn.init.trunc_normal_(torch.zeros(N, N)[:7]),
}


@pytest.mark.parametrize("way", TABLES)
def test_a_table_is_made_again_to_the_bit(way: str) -> None:
    found = saved(seen(TABLES[way]))
    assert found.fixed
    assert found.std == 0
    assert torch.equal(drawn(found, tuple(TABLES[way]().shape)), TABLES[way]())
    assert torch.equal(drawn(found.scaled(-2), tuple(TABLES[way]().shape)), -2 * TABLES[way]())


@pytest.mark.parametrize("way", RANDOM)
def test_any_other_random_initialization_is_drawn_again(way: str) -> None:
    """Row by row and column by column the draw has the constructor's own mean and mean square."""
    found = saved(seen(RANDOM[way]))
    own = torch.stack([RANDOM[way]().detach().float() for _ in range(40)])
    again = torch.stack([drawn(found, tuple(own.shape[1:]), seed) for seed in range(40)])
    assert not found.fixed
    assert not torch.equal(again[0], again[1])
    assert torch.equal(again[0], drawn(found, tuple(own.shape[1:]), 0))
    for dim in (1, -1):
        for moment in (1, 2):
            runs = [(x**moment).double().mean(dim) for x in (own, again)]
            error = torch.sqrt(sum(run.var(0) for run in runs) / 40)
            assert ((runs[0].mean(0) - runs[1].mean(0)).abs() <= 7 * error + 1e-6).all(), (dim, moment)


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    found = saved(seen(RANDOM["orthogonal_"]))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    drawn(found, (N, 2 * N))
    assert torch.equal(torch.rand(3), expected)


def test_parts_are_seen_as_parts() -> None:
    """So that a shard is drawn without the whole; a program would need it."""
    row = saved(seen(RANDOM["a row"]))
    assert (row.kind, row.b, row.parts[0].box, row.parts[0].init) == (
        "normal",
        1,
        ((3, 1, 1), (0, N, 1)),
        Init("constant", 0),
    )
    fused = saved(seen(halves))
    assert (fused.b, fused.parts[0].init.b, fused.parts[0].box) == (0.1, 0.5, ((0, 3, 1), (N, N, 1), (0, N, 1)))
    bias = saved(seen(forgetting))
    assert [(part.box, part.init.a) for part in bias.parts] == [(((N, N, 1),), 1)]


def test_copies_of_one_draw_stay_copies() -> None:
    """Equal rows have the moments of independent ones: only the program tells them apart."""
    again = drawn(saved(seen(RANDOM["repeated"])), (N, N))
    assert (again == again[0]).all()
    assert again[0].unique().numel() == N


def test_tiles_of_a_large_parameter() -> None:
    """No two tiles are alike, and a part lies where it was seen, in whatever tile."""
    weight = drawn(saved(seen(lambda: nn.Embedding(40, 5000, padding_idx=33).weight)), (40, 5000))
    assert (weight == 0).all(1).nonzero().flatten().tolist() == [33]
    assert weight.unique().numel() > 0.98 * 39 * 5000  # float32 normals do meet
    assert weight[torch.arange(40) != 33].std().item() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: torch.empty(N), "torch.empty, never filled"),
        (lambda: torch.empty(N, 2).t()[0].normal_()._base, "torch.empty, filled only in part"),
        (
            lambda: torch.from_numpy(np.random.default_rng(0).normal(size=100_000)),
            "a table of 100000 numbers from outside",
        ),
    ],
)
def test_what_cannot_be_drawn_again_is_named(build: Callable[[], torch.Tensor], said: str) -> None:
    found = seen(build)
    assert found == said


def test_a_refusal_names_the_parameter() -> None:
    class Unfilled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.empty(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain

    family = mt.Family(lambda s: Unfilled(s.width), torch.zeros(1), lambda m, x: m(x).sum(), mt.Scale(width=16))
    with pytest.raises(RequestError, match=r"how gain \[16\] is initialized \(torch.empty, never filled\)"):
        mt.plan(family, family.base)


@pytest.mark.parametrize(
    "steps",
    [
        [{"op": "os.system.default", "args": ["true"], "kwargs": {}, "results": []}],
        [{"op": "aten.from_file.default", "args": ["/etc/passwd"], "kwargs": {}, "results": []}],
        [{"op": "aten.randn.default", "args": 3, "kwargs": {}, "results": []}],
        [{"op": "aten.randn.no_such", "args": [], "kwargs": {}, "results": []}],
        [{"op": "aten.randn"}],
        3,
    ],
)
def test_a_plan_from_a_file_runs_aten_operations_only(steps: Any) -> None:
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        Program.from_dict({"sizes": [4], "steps": steps, "result": [0, "float32", [1], [1], 0]})


class Special(nn.Module):
    """An embedding with a padding row, orthogonal matrices, a table and a bias of a state space, a truncated readout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width, padding_idx=2)
        self.hidden = nn.Linear(width, width)
        self.readout = nn.Linear(width, 3, bias=False)
        self.table = nn.Parameter(torch.log(torch.arange(1, width + 1).float()))
        self.mix = nn.Linear(width, width, bias=False)
        self.marks = nn.Parameter(torch.zeros(width))
        nn.init.eye_(self.mix.weight)
        with torch.no_grad():
            for i in range(0, width, 8):
                self.marks[i] = 1
        nn.init.orthogonal_(self.hidden.weight, gain=2)
        nn.init.orthogonal_(self.readout.weight)
        self.hidden.bias.data.copy_(torch.exp(torch.rand(width)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.readout(self.mix(self.hidden(self.embedding(tokens)).relu() * self.table) + self.marks)


SPECIAL = mt.Family(
    lambda s: Special(s.width),
    torch.zeros(2, 3, dtype=torch.long),
    lambda m, x: m(x).square().mean(),
    mt.Scale(width=16),
)


def test_special_initializations_at_the_target(tmp_path: Path) -> None:
    """Matrices have the base's measured std times the factor; tables, padding rows and odd biases are the target's own."""
    plan = mt.Plan.load(mt.plan(SPECIAL, mt.Scale(width=N)).save(tmp_path / "plan.json"))
    model = SPECIAL.build(plan.scale)
    plan.initialize(model, seed=1)
    weights, rows = dict(model.named_parameters()), {row.name: row for row in plan.rows}
    own = 2 / math.sqrt(16)  # an orthogonal matrix: every column has length 2
    assert rows["hidden.weight"].init.std == pytest.approx(own / 2, rel=0.02)
    assert weights["hidden.weight"].std().item() == pytest.approx(own / 2, rel=0.02)
    gram = weights["hidden.weight"] @ weights["hidden.weight"].T
    assert torch.allclose(gram / gram[0, 0], torch.eye(N), atol=1e-5)
    # The readout's own std at the target is 1/√64; µP wants the base's 1/√16 over 4.
    assert weights["readout.weight"].std(correction=0).item() == pytest.approx(1 / 4 / 4, rel=0.02)
    assert torch.equal(weights["table"], torch.log(torch.arange(1, N + 1).float()))
    assert torch.equal(weights["mix.weight"], torch.eye(N))
    assert torch.equal(weights["marks"], (torch.arange(N) % 8 == 0).float())
    assert rows["table"].init_factor is None
    assert (weights["embedding.weight"] == 0).all(1).tolist() == [False, False, True, False, False, False, False]
    assert 1 <= weights["hidden.bias"].min() < 1.2 < 2.5 < weights["hidden.bias"].max() < math.e


def test_pieces_that_come_and_go_with_the_width_are_refused() -> None:
    class Pieces(nn.Linear):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            with torch.no_grad():
                for i in range(0, self.out_features, 8):
                    self.weight[i] = 0

    family = families.mlp()

    def build(scale: mt.Scale) -> nn.Module:
        width = scale.width
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), Pieces(width, width), nn.Linear(width, 10))

    family = mt.Family(build, family.batch, family.loss, mt.Scale(width=16))
    assert mt.plan(family, family.base).rows[2].init.parts[1].box[0] == (8, 1, 1)
    with pytest.raises(
        RequestError, match=r"2.weight \[32, 32\] is drawn in 3 pieces at the base and in 5 at the target"
    ):
        mt.plan(family, mt.Scale(width=32))


def test_a_model_without_memory_is_refused() -> None:
    plan = mt.plan(SPECIAL, SPECIAL.base)
    with torch.device("meta"):
        model = SPECIAL.build(plan.scale)
    with pytest.raises(RequestError, match=r"table is on the meta device: call model.to_empty"):
        plan.initialize(model)
    plan.initialize(model.to_empty(device="cpu"))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_type_of_the_parameters_does_not_change_the_draw() -> None:
    plan = mt.plan(SPECIAL, SPECIAL.base)
    single, half = SPECIAL.build(plan.scale), SPECIAL.build(plan.scale).bfloat16()
    plan.initialize(single)
    plan.initialize(half)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, single.get_parameter(name).bfloat16()), name


@pytest.mark.parametrize(
    ("way", "world"),
    [
        ("fully_shard", 2),
        ("tensor parallel", 2),
        pytest.param("hybrid", 4, marks=pytest.mark.slow),
        pytest.param("both", 4, marks=pytest.mark.slow),
    ],
)
def test_any_sharding_gives_the_same_weights(way: str, world: int, tmp_path: Path) -> None:
    """From the meta device, through to_empty; uneven shards, parts, programs and replicas among them."""
    script = str(Path(__file__).with_name("sharded.py"))
    command = [sys.executable, script, way]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in ranks]
    assert [code for _, code in ends] == [0] * world, ends


def test_a_shard_is_drawn_without_the_whole() -> None:
    command = [sys.executable, str(Path(__file__).with_name("sharded.py")), "measure"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
BODY = SMALL | {"intermediate_size": 128, "num_attention_heads": 4}
IMAGES = {"image_size": 32, "patch_size": 8}
DECODER = BODY | {"num_key_value_heads": 2}
SPEECH = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}),
    "ViTForImageClassification": ("ViTConfig", BODY | IMAGES),
    "T5ForConditionalGeneration": ("T5Config", {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99}),
    "MambaForCausalLM": ("MambaConfig", SMALL | {"state_size": 8}),
    "LlamaForCausalLM": ("LlamaConfig", DECODER | {"pad_token_id": 0}),
}  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "MixtralForCausalLM": ("MixtralConfig", DECODER),
    "BertForMaskedLM": ("BertConfig", BODY),
    "Mamba2ForCausalLM": ("Mamba2Config", SMALL | {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "RwkvForCausalLM": ("RwkvConfig", SMALL | {"context_length": 32}),
    "Gemma2ForCausalLM": ("Gemma2Config", DECODER | {"head_dim": 16}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", DECODER | EXPERTS),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", BODY | LATENT | ROUTED | {"first_k_dense_replace": 1}),
    "FalconH1ForCausalLM": ("FalconH1Config", DECODER | {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16}),
    "OPTForCausalLM": ("OPTConfig", BODY | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "WhisperForConditionalGeneration": ("WhisperConfig", SPEECH | {"vocab_size": 99, "pad_token_id": 1}),
    "CLIPModel": ("CLIPConfig", {"text_config": BODY, "vision_config": BODY | IMAGES}),
    "SwinForImageClassification": ("SwinConfig", {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], **IMAGES}),
    "ConvNextForImageClassification": ("ConvNextConfig", {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "sinusoidal_pos_embds": True},
    ),
    "Dinov2Model": ("Dinov2Config", BODY | IMAGES),
    "Wav2Vec2Model": ("Wav2Vec2Config", BODY),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", DECODER | EXPERTS | {"head_dim": 16}),
    "GptOssForCausalLM": ("GptOssConfig", DECODER | {"num_local_experts": 4, "head_dim": 16}),
}


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_parameter_of_a_real_architecture(name: str) -> None:
    """Tables come out to the bit, zeros where they were, and the mean and std of what is drawn are the constructor's."""
    transformers = pytest.importorskip("transformers")
    config, fields = (MODELS | MORE)[name]
    config = getattr(transformers, config)(**fields)
    with FakeTensorMode(allow_non_fake_inputs=True), InitWatcher() as watcher:
        fake = getattr(transformers, name)(config)
    inits = watcher.named(fake)
    own, other = getattr(transformers, name)(config), getattr(transformers, name)(config)
    assert inits.keys() == dict(own.named_parameters()).keys()
    for key, weight in own.named_parameters():
        init = saved(inits[key])
        again = torch.empty_like(weight)
        draw_(again, init, 0, key)
        assert torch.equal(weight, other.get_parameter(key)) == init.fixed, key
        assert torch.equal(weight == 0, again == 0), key
        if init.fixed:
            assert torch.equal(weight, again), key
            continue
        std, error = weight.std(correction=0).item(), 8 / math.sqrt(2 * weight.numel()) + 0.01
        assert again.std(correction=0).item() == pytest.approx(std, rel=error), key
        assert again.mean().item() == pytest.approx(weight.mean().item(), abs=8 * std / math.sqrt(weight.numel())), key
        if not init.parts:
            assert init.std == pytest.approx(std, rel=error), key
