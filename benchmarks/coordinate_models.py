"""Healthy models on which the coordinate check was not developed, written as people write them: for its false alarms.

Each is planned by µP, so every verdict should be "pass", or "undecided" where finite width bends a slope. `DEVELOPED_ON` are
those that were looked at while the check was made; no false alarm is counted of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt

__all__ = ["DEVELOPED_ON", "MODELS"]

SYMBOLS, LENGTH, CLASSES, HEAD = 64, 16, 10, 16


def _linear(fan_in: int, fan_out: int, *, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    nn.init.normal_(layer.weight, std=fan_in**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Causal or full self-attention with a fixed head dim."""

    def __init__(self, width: int, causal: bool, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = width // HEAD, causal
        self.q, self.k, self.v, self.out = (_linear(width, width, bias=bias) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, width = x.shape
        q, k, v = (part(x).view(b, t, self.heads, HEAD).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(b, t, width))


class Block(nn.Module):
    """Attention and a GELU layer four times as wide, normalized before or after."""

    def __init__(self, width: int, causal: bool, post: bool, bias: bool = False) -> None:
        super().__init__()
        self.post = post
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, causal, bias)
        self.up, self.down = _linear(width, 4 * width, bias=bias), _linear(4 * width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Learned positions, two blocks, a readout of its own."""

    def __init__(self, width: int, depth: int, post: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(SYMBOLS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, True, post) for _ in range(depth))
        self.norm = nn.Identity() if post else nn.LayerNorm(width)
        self.readout = _linear(width, SYMBOLS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.readout(self.norm(h))


class Experts(nn.Module):
    """Four experts as stacks of matrices, each token sent to its best two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = _linear(width, 4)
        self.up = nn.Parameter(torch.randn(4, width, 2 * width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(4, 2 * width, width) * (2 * width) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.router(x).softmax(-1)
        best = gates.topk(2, dim=-1).values[..., -1:]
        gates = torch.where(gates >= best, gates, torch.zeros_like(gates))
        hidden = F.silu(torch.einsum("btc,ecf->btef", x, self.up))
        made = torch.einsum("btef,efc->btec", hidden, self.down)
        return (made * gates[..., None]).sum(2)


class MoE(nn.Module):
    """A pre-norm transformer whose feed-forward layers are experts."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(SYMBOLS, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.attention = nn.ModuleList(Attention(width, True) for _ in range(depth))
        self.experts = nn.ModuleList(Experts(width) for _ in range(depth))
        self.norm, self.readout = nn.LayerNorm(width), _linear(width, SYMBOLS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x)
        for i, (attention, experts) in enumerate(zip(self.attention, self.experts, strict=True)):
            h = h + attention(self.norms[2 * i](h))
            h = h + experts(self.norms[2 * i + 1](h))
        return self.readout(self.norm(h))


class ViT(nn.Module):
    """Patches of 2×2, learned positions, a class token, pre-norm blocks with biases."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Block(width, False, False, bias=True) for _ in range(depth))
        self.norm, self.readout = nn.LayerNorm(width), _linear(width, CLASSES, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.readout(self.norm(h[:, 0]))


class ConvNet(nn.Module):
    """Three convolutions with batch norm and ReLU in place, pooled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [
                nn.Conv2d(width if i else 1, width, 3, padding=1, stride=1 + (i == 1)),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        self.layers, self.readout = nn.Sequential(*layers), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.layers(x).mean((2, 3)))


class LSTM(nn.Module):
    """Embedding, one LSTM layer, a readout at every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self.lstm, self.readout = (
            nn.Embedding(SYMBOLS, width),
            nn.LSTM(width, width, batch_first=True),
            _linear(width, SYMBOLS),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.lstm(self.tokens(x))[0])


class Mixer(nn.Module):
    """MLP-Mixer: layers over the 16 patches (fixed) and over the channels (growing)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.across = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(depth)
        )
        self.within = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.patches(F.unfold(x, 2, stride=2).transpose(1, 2))
        for i, (across, within) in enumerate(zip(self.across, self.within, strict=True)):
            h = h + across(self.norms[2 * i](h).transpose(1, 2)).transpose(1, 2)
            h = h + within(self.norms[2 * i + 1](h))
        return self.readout(self.norm(h).mean(1))


class LlamaBlock(nn.Module):
    """RMSNorm, rotary positions, two query heads for each of keys and values, SwiGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.groups = width // HEAD, width // HEAD // 2
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.o_proj = _linear(width, width), _linear(width, width)
        self.k_proj, self.v_proj = _linear(width, width // 2), _linear(width, width // 2)
        self.gate_proj, self.up_proj = _linear(width, 2 * width), _linear(width, 2 * width)
        self.down_proj = _linear(2 * width, width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, width = x.shape
        h = self.norm1(x)
        q = self.q_proj(h).view(b, t, self.heads, HEAD).transpose(1, 2)
        k, v = (part(h).view(b, t, self.groups, HEAD).transpose(1, 2) for part in (self.k_proj, self.v_proj))
        q, k = (each * cos + torch.cat([-each[..., HEAD // 2 :], each[..., : HEAD // 2]], -1) * sin for each in (q, k))
        k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(b, t, width))
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    """Llama written out."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(SYMBOLS, width)
        self.layers = nn.ModuleList(LlamaBlock(width) for _ in range(depth))
        self.norm, self.lm_head = nn.RMSNorm(width), _linear(width, SYMBOLS)
        angle = torch.arange(LENGTH)[:, None] * 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
        self.register_buffer("cos", angle.cos().repeat(1, 2))
        self.register_buffer("sin", angle.sin().repeat(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed_tokens(x)
        for layer in self.layers:
            h = layer(h, self.cos, self.sin)
        return self.lm_head(self.norm(h))


class ParallelBlock(nn.Module):
    """Attention and a gated GELU layer side by side, behind one norm (GPT-J, PaLM)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, True)
        self.gate, self.up, self.down = _linear(width, 4 * width), _linear(width, 4 * width), _linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.attention(h) + self.down(F.gelu(self.gate(h)) * self.up(h))


class ParallelGPT(nn.Module):
    """Blocks whose two branches are side by side."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(SYMBOLS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(ParallelBlock(width) for _ in range(depth)))
        self.norm, self.readout = nn.LayerNorm(width), _linear(width, SYMBOLS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.readout(self.norm(self.blocks(h)))


class Translator(nn.Module):
    """torch's own encoder and decoder (post-norm, ReLU, biases), heads of 16."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(SYMBOLS, width), nn.Embedding(LENGTH, width)
        self.transformer = nn.Transformer(width, width // HEAD, depth, depth, 2 * width, dropout=0.0, batch_first=True)
        self.readout = nn.Linear(width, SYMBOLS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.readout(self.transformer(h.flip(1), h, tgt_mask=mask))


class Residual(nn.Module):
    """Group norm, ReLU and a 3×3 convolution, twice, before the sum (He et al. 1603.05027)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class PreActivationResNet(nn.Module):
    """Residual blocks on a constant number of channels, pooled."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.norm, self.readout = nn.GroupNorm(4, width), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


class Gated(nn.Module):
    """Gated linear recurrence h ← a·h + (1 − a)·x, a = sigmoid(W x), between norms; no attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.gate, self.value, self.out = (
            nn.LayerNorm(width),
            _linear(width, width, bias=True),
            _linear(width, width),
            _linear(width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        keep, value = torch.sigmoid(self.gate(h)), self.value(h)
        state, states = torch.zeros_like(value[:, 0]), []
        for t in range(x.shape[1]):
            state = keep[:, t] * state + (1 - keep[:, t]) * value[:, t]
            states.append(state)
        return x + self.out(torch.stack(states, 1))


class Recurrent(nn.Module):
    """Gated linear recurrences in the place of attention, feed-forward layers between them."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(SYMBOLS, width)
        self.mixers = nn.ModuleList(Gated(width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.ffns = nn.ModuleList(
            nn.Sequential(_linear(width, 2 * width, bias=True), nn.SiLU(), _linear(2 * width, width, bias=True))
            for _ in range(depth)
        )
        self.norm, self.readout = nn.LayerNorm(width), _linear(width, SYMBOLS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x)
        for mixer, norm, ffn in zip(self.mixers, self.norms, self.ffns, strict=True):
            h = mixer(h)
            h = h + ffn(norm(h))
        return self.readout(self.norm(h))


def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def _family(name: str, make: Callable[[int, int], nn.Module], kind: str) -> Callable[[int], mt.Family]:
    def at(base: int) -> mt.Family:
        generator = torch.Generator().manual_seed(0)
        if kind == "tokens":
            tokens = torch.randint(SYMBOLS, (4, LENGTH + 1), generator=generator)
            batch = tokens[:, :-1], tokens[:, 1:]
        else:
            batch = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(CLASSES, (8,), generator=generator)
        return mt.Family(lambda s: make(s.width, s.depth), batch, _loss, mt.Scale(base, 2), name)

    return at


# name → base width → family
MODELS: dict[str, Callable[[int], mt.Family]] = {
    name: _family(name, make, kind)
    for name, make, kind in (
        ("pre_norm_gpt", lambda w, d: GPT(w, d, post=False), "tokens"),
        ("post_norm_gpt", lambda w, d: GPT(w, d, post=True), "tokens"),
        ("llama", Llama, "tokens"),
        ("vit", ViT, "images"),
        ("convnet", lambda w, d: ConvNet(w), "images"),
        ("lstm", lambda w, d: LSTM(w), "tokens"),
        ("mixer", Mixer, "images"),
        ("moe", MoE, "tokens"),
        ("parallel_gpt", ParallelGPT, "tokens"),
        ("translator", Translator, "tokens"),
        ("preact_resnet", PreActivationResNet, "images"),
        ("recurrent", Recurrent, "tokens"),
    )
}
DEVELOPED_ON = ("pre_norm_gpt", "mixer", "moe")
