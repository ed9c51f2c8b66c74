"""What a step costs is what a person counts by hand, for every kind of layer, on fake tensors as on real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.flop_formulas import FORMULAS, is_free
from mutransfer.price import FakeValues, FlopCounter, step_cost, step_flops

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "price_count.py"
B, T, D, H = 3, 32, 32, 2  # batch, positions, width over all heads, heads


def counted(run: Callable[[], Any]) -> tuple[set[float], set[str]]:
    """The cost on real and on fake tensors, and what was not counted."""
    with FlopCounter() as real:
        run()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FakeValues(mode), FlopCounter() as fake:
        run()
    return {real.flops.total, fake.flops.total}, {*real.flops.uncounted, *fake.flops.uncounted}


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def heads(count: int = H) -> torch.Tensor:
    return leaf(B, count, T, D // H)


def trained(out: torch.Tensor) -> None:
    (out * torch.ones_like(out)).sum().backward()


@pytest.mark.extended
def test_twelve_kinds_of_layer_within_a_percent() -> None:
    command = [sys.executable, SCRIPT, "--json", "--quick"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    claims = json.loads(done.stdout.splitlines()[-1])["claims"]
    assert len(claims) == 24
    assert [claim for claim in claims if not 0.99 <= claim["low"] <= claim["high"] <= 1.01] == []


def causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= key


def evaluated(layer: nn.Module, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        layer.eval()(*inputs)


def in_inference_mode(layer: nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        layer(x)


def autocast(layer: nn.Module, x: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    trained(out.float())


COMPLEX = torch.complex64
ENDS = torch.tensor([4, 4, 12], dtype=torch.int32)  # of groups of 4, 0 and 8 rows
# What is run, and its operations: 2 per multiply-add, the backward pass twice the forward one.
BY_HAND: dict[str, tuple[Callable[[], Any], float]] = {
    "flex attention": (lambda: trained(flex_attention(heads(), heads(), heads())), 12 * B * T * T * D),
    "flex attention, masked": (
        lambda: trained(
            flex_attention(heads(), heads(), heads(), block_mask=create_block_mask(causal, None, None, T, T, device="cpu"))
        ),
        12 * B * T * T * D,
    ),
    "flex attention, grouped and compiled": (
        lambda: trained(torch.compile(flex_attention)(heads(), heads(1), heads(1), enable_gqa=True)),
        12 * B * T * T * D,
    ),
    "values of another width": (
        lambda: trained(F.scaled_dot_product_attention(heads(), heads(), leaf(B, H, T, D))),
        6 * B * T * T * (D + H * D),
    ),
    "attention without heads": (
        lambda: trained(F.scaled_dot_product_attention(leaf(B, T, D), leaf(B, 5, D), leaf(B, 5, D))),
        12 * B * T * 5 * D,
    ),
    "nn.MultiheadAttention, evaluated": (
        lambda: evaluated(nn.MultiheadAttention(D, H, batch_first=True), *3 * [torch.randn(B, T, D)]),
        B * (8 * T * D * D + 4 * T * T * D),
    ),
    "nn.TransformerEncoderLayer": (
        lambda: trained(nn.TransformerEncoderLayer(D, H, 4 * D, batch_first=True)(leaf(B, T, D))),
        B * (72 * T * D * D + 12 * T * T * D),
    ),
    "nn.TransformerEncoderLayer, evaluated": (
        lambda: evaluated(nn.TransformerEncoderLayer(D, H, 4 * D, batch_first=True), torch.randn(B, T, D)),
        B * (24 * T * D * D + 4 * T * T * D),
    ),
    "torch's fused encoder layer": (
        lambda: torch._transformer_encoder_layer_fwd(
            torch.randn(B, T, D), D, H, torch.randn(3 * D, D), torch.randn(3 * D), torch.randn(D, D), torch.randn(D), True, True,
            1e-5, torch.randn(D), torch.randn(D), torch.randn(D), torch.randn(D), torch.randn(4 * D, D), torch.randn(4 * D),
            torch.randn(D, 4 * D), torch.randn(D),
        ),
        B * (24 * T * D * D + 4 * T * T * D),
    ),
    "two layers of a bidirectional LSTM, evaluated": (
        lambda: evaluated(nn.LSTM(D, D, 2, bidirectional=True), torch.randn(T, B, D)),
        2 * B * T * 2 * (4 * D * (D + D) + 4 * D * (2 * D + D)),
    ),
    "an LSTM's cell": (lambda: trained(nn.LSTMCell(D, D)(leaf(B, D))[0]), 2 * B * 4 * D * D * (2 + 2 + 1)),
    "a plain RNN in inference mode": (lambda: in_inference_mode(nn.RNN(D, D), torch.randn(T, B, D)), 4 * B * T * D * D),
    "a linear layer in inference mode": (lambda: in_inference_mode(nn.Linear(D, 7), torch.randn(B, T, D)), 2 * B * T * 7 * D),
    "a linear layer in bfloat16": (lambda: autocast(nn.Linear(D, 7), leaf(B, T, D)), 6 * B * T * 7 * D),
    "a compiled linear layer": (lambda: trained(torch.compile(nn.Linear(D, 7))(leaf(B, T, D))), 6 * B * T * 7 * D),
    "einsum": (lambda: trained(torch.einsum("btd,dk->bkt", leaf(B, T, D), leaf(D, 7))), 6 * B * T * D * 7),
    "vectors": (lambda: trained(leaf(T, D) @ leaf(D)) or trained(leaf(D).dot(leaf(D))), 4 * T * D + 2 * D),
    "nn.Bilinear": (lambda: trained(nn.Bilinear(D, 5, 7)(leaf(T, D), leaf(T, 5))), 8 * T * D * 5 * 7),  # and three gradients
    "distances": (lambda: torch.cdist(torch.randn(B, T, D), torch.randn(B, 40, D)), 2 * B * T * 40 * D),
    "distances of order one": (lambda: torch.cdist(torch.randn(T, D), torch.randn(9, D), p=1.0), 2 * T * 9 * D),
    "complex": (lambda: trained((leaf(T, D, dtype=COMPLEX) @ leaf(D, 7, dtype=COMPLEX)).abs()), 3 * 8 * T * D * 7),
    "grouped matmul": (lambda: trained(F.grouped_mm(leaf(12, D), leaf(3, D, 8), offs=ENDS)), 6 * 12 * D * 8),
    "grouped matmul of batches": (lambda: F.grouped_mm(torch.randn(3, 4, D), torch.randn(3, D, 8)), 2 * 3 * 4 * D * 8),
    "depthwise convolution": (lambda: trained(nn.Conv1d(D, D, 4, padding=3, groups=D)(leaf(B, D, T))), 6 * B * (T + 3) * D * 4),
    "transposed convolution": (
        lambda: trained(nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)(leaf(B, 6, 5, 5))),
        6 * B * 25 * 6 * 2 * 9,
    ),
    "convolution of one example": (lambda: trained(nn.Conv2d(3, 8, 3)(leaf(3, 6, 6))), 6 * 16 * 27 * 8),
    "scan": (
        lambda: torch._higher_order_ops.scan(lambda c, x: (c @ x, c @ x), torch.randn(4, 4), torch.randn(T, 4, 4)),
        2 * 2 * T * 4**3,
    ),
    "the dearer branch": (
        lambda: torch.cond(torch.randn(()) > 0, lambda x: (x @ x,), lambda x: (x @ x @ x,), (torch.randn(4, 4),)),
        2 * 2 * 4**3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, on importing its compiler
def test_by_hand(name: str) -> None:
    run, expected = BY_HAND[name]
    assert counted(run) == ({expected}, set())


@torch.library.custom_op("mutransfer_tests::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@product.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lambda: torch.fft.rfft(torch.randn(8, 8)), {"aten::_fft_r2c"}),
        (lambda: torch.linalg.qr(torch.randn(8, 8)), {"aten::linalg_qr"}),
        (lambda: torch.linalg.solve(torch.randn(8, 8), torch.randn(8)), {"aten::_linalg_solve_ex"}),
        (lambda: product(torch.randn(8, 8), torch.randn(8, 8)), {"mutransfer_tests::product"}),
    ],
)
def test_work_without_a_formula_is_named(run: Callable[[], Any], names: set[str]) -> None:
    costs, uncounted = counted(run)
    assert costs == {0.0}
    assert uncounted >= names


def test_sequences_of_several_lengths() -> None:
    """3 and 5 positions in one ragged tensor, through a linear layer and attention."""
    rows = [torch.randn(3, D), torch.randn(5, D)]
    with FlopCounter() as counter:
        ragged = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
        F.linear(ragged, leaf(7, D)).values().sum().backward()
    assert (counter.flops.total, counter.flops.uncounted) == (6 * 8 * D * 7, ())


def test_sparse_products_are_named() -> None:
    with FlopCounter() as counter:
        torch.sparse.mm(torch.eye(8).to_sparse(), torch.randn(8, 8))
    assert any("sparse" in name for name in counter.flops.uncounted)


def test_everything_of_torch_is_counted_free_or_named() -> None:
    """No product hides among the free: of torch's operations, those whose names say product or solver are counted or named."""
    heavy = ("mm", "matmul", "linear", "conv", "attention", "rnn", "gru", "lstm", "dot", "mv", "bilinear", "fft", "solve",
             "cholesky", "_svd", "_qr", "_eig", "inverse", "pinv", "matrix_exp", "encoder", "cdist", "pdist")  # fmt: skip
    harmless = ("upsample", "fused_gru_cell", "fused_lstm_cell", "gamma", "digamma", "fftfreq", "convert", "rnn_flatten",
                "reorder_conv", "hamming", "dummy", "slice_inverse", "gammainc", "igamma", "cummin", "cummax")  # fmt: skip
    hidden = []
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, full = name.partition("::")
        packet_name, _, overload = full.partition(".")
        if namespace != "aten" or not any(each in packet_name for each in heavy):
            continue
        if any(each in packet_name for each in harmless):
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
            continue  # it is broken down
        packet = getattr(torch.ops.aten, packet_name, None)
        if packet is None or packet in FORMULAS:
            continue
        if is_free(getattr(packet, overload or "default")):
            hidden.append(name)
    assert hidden == []


class Router(nn.Module):
    """Experts of a feed-forward layer, chosen in one of the ways that models are written in."""

    def __init__(self, how: str, width: int, count: int = 4, top: int = 2) -> None:
        super().__init__()
        self.how, self.top = how, top
        self.embedding, self.gate = nn.Embedding(11, width), nn.Linear(width, count, bias=False)
        self.up, self.down = (
            nn.Parameter(torch.randn(count, width, 2 * width)),
            nn.Parameter(torch.randn(count, 2 * width, width)),
        )
        self.readout = nn.Linear(width, 11)

    def expert(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x @ self.up[i]) @ self.down[i]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).flatten(0, 1)
        shares, chosen = self.gate(x).softmax(-1).topk(self.top)
        out = torch.zeros_like(x)
        if self.how == "where":
            for i in range(len(self.up)):
                row, place = torch.where(chosen == i)
                out = out.index_add(0, row, self.expert(i, x[row]) * shares[row, place, None])
        elif self.how == "mask":
            for i in range(len(self.up)):
                mask = (chosen == i).any(-1)
                if mask.any():
                    out[mask] = out[mask] + self.expert(i, x[mask]) * shares[mask].sum(-1, keepdim=True)
        elif self.how == "mixtral":
            mask = F.one_hot(chosen, len(self.up)).permute(2, 1, 0)
            for i in mask.sum((-1, -2)).greater(0).nonzero():
                place, row = torch.where(mask[i[0]])
                out = out.index_add(0, row, self.expert(int(i[0]), x[row]) * shares[row, place, None])
        elif self.how == "split":
            order = chosen.flatten().argsort()
            counts = torch.bincount(chosen.flatten(), minlength=len(self.up)).tolist()
            parts = x[order // self.top].split(counts)
            done = torch.cat([self.expert(i, part) for i, part in enumerate(parts)])
            out = out.index_add(0, order // self.top, done * shares.flatten()[order, None])
        else:  # grouped
            order = chosen.flatten().argsort()
            ends = torch.bincount(chosen.flatten(), minlength=len(self.up)).cumsum(0).to(torch.int32)
            done = F.grouped_mm(F.relu(F.grouped_mm(x[order // self.top], self.up, offs=ends)), self.down, offs=ends)
            out = out.index_add(0, order // self.top, done * shares.flatten()[order, None])
        return self.readout(x + out)


def tokens(size: int = 4, length: int = 16) -> Any:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(11, (size, length), generator=generator) for _ in range(2))


def entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1].flatten())


def family(build: Callable[[int], nn.Module], width: int = 32) -> mt.Family:
    return mt.Family(lambda scale: build(scale.width), tokens(), entropy, mt.Scale(width, 1))


@pytest.mark.parametrize("how", ["where", "mask", "mixtral", "split", "grouped"])
@pytest.mark.parametrize("width", [32, 8192])
def test_experts_that_a_router_chooses(how: str, width: int) -> None:
    """Every token goes to two of four experts, whichever; at 8192 the model could not be run here."""
    cost = step_cost(family(lambda width: Router(how, width)), mt.Scale(width, 1), tokens())
    assert cost.total == 6 * 64 * (4 * width + 2 * 4 * width**2 + 11 * width)
    assert cost.uncounted == ()


def test_padding_is_left_out_as_the_batch_says() -> None:
    """What is known of the batch is exact: a third of the tokens are padding."""

    class Packed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embedding, self.readout = nn.Embedding(11, width), nn.Linear(width, 11)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.readout(self.embedding(batch)[batch != 0])

    batch = torch.arange(30).remainder(3).view(2, 15)
    loss = lambda model, batch: model(batch).logsumexp(-1).sum()  # noqa: E731
    packed = mt.Family(lambda scale: Packed(scale.width), batch, loss, mt.Scale(32, 1))
    assert step_flops(packed, packed.base, batch) == 6 * 20 * 32 * 11


def test_a_value_that_takes_the_whole_model_is_refused() -> None:
    class Asks(Router):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out = super().forward(tokens)
            return out if self.up.abs().max() < 100 else out / 2

    with pytest.raises(RequestError, match="needs values"):
        step_cost(family(lambda width: Asks("split", width)), mt.Scale(8192, 1), tokens())


def test_mixtral() -> None:
    """transformers' own, with its sparse layers as they run by default."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=11, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    made = mt.Family(
        lambda _: transformers.MixtralForCausalLM(config), tokens(), lambda m, b: entropy(lambda x: m(x).logits.flatten(0, 1), b),
        mt.Scale(32, 1),
    )  # fmt: skip
    cost = step_cost(made, made.base, tokens())
    weights = 2 * (32 * 32 * 3 + 4 * 32 + 2 * 3 * 32 * 64) + 11 * 32
    assert cost.uncounted == ()
    assert cost.total == pytest.approx(6 * 64 * weights + 2 * 12 * 64 * 16 * 32, rel=0.01)
