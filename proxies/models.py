"""The built-in models: plain torch modules that know nothing of µP.

Shape suffixes: B batch, T time, C width, H query heads, G key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from mutransfer.errors import RequestError

__all__ = ["MLP", "ResNet", "Transformer", "TransformerShape"]


class MLP(nn.Module):
    """ReLU network with ``depth`` hidden layers of ``width`` units and torch's own default initialization.

    Args:
        inputs: features of one example after flattening.
        width: units of each hidden layer.
        depth: hidden layers, at least 1.
        classes: logits.
    """

    def __init__(self, inputs: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.readout = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map examples ``[N, ...]`` to logits ``[N, classes]``."""
        h = torch.relu(self.input(x.flatten(1)))
        for layer in self.hidden:
            h = torch.relu(layer(h))
        return self.readout(h)


GROUPS = 8


class ResidualBlock(nn.Module):
    """norm → relu → conv → norm → relu → conv, added to the residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the residual stream ``[N, C, H, W]`` to itself."""
        h = self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(torch.relu(self.norm2(h)))


class ResNet(nn.Module):
    """Pre-activation residual network (He et al. 1603.05027) with GroupNorm and one resolution per half.

    Args:
        inputs: channels of the image.
        width: channels of every block, a multiple of the 8 normalization groups.
        depth: residual blocks; the image is halved once, in the middle.
        classes: logits.

    Raises:
        RequestError: the width is not a multiple of the normalization groups.
    """

    def __init__(self, inputs: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        if width % GROUPS:
            raise RequestError(
                f"resnet's width {width} is not a multiple of its {GROUPS} norm groups: try {_up(width)}."
            )
        self.stem = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.GroupNorm(GROUPS, width)
        self.readout = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``[N, inputs, H, W]`` to logits ``[N, classes]``."""
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            if i == len(self.blocks) // 2:
                x = F.avg_pool2d(x, 2)
            x = block(x)
        x = torch.relu(self.norm(x))
        return self.readout(x.mean((2, 3)))


def _up(width: int) -> int:
    return -(-width // GROUPS) * GROUPS


@dataclass(frozen=True)
class TransformerShape:
    """What a transformer's sizes are, given its width.

    Exactly one of ``head_dim`` and ``heads`` is fixed: with a fixed head dim the number of heads grows with the width
    (today's usual way), with fixed heads the head dim grows, and µP then asks for 1/d attention.

    Args:
        width: size of the residual stream.
        depth: blocks.
        vocabulary: tokens.
        head_dim: size of one head, or None when ``heads`` is fixed.
        heads: query heads, or None when ``head_dim`` is fixed.
        kv_heads: key/value heads; None for as many as query heads, else a fixed number that divides them.
        kv_share: query heads per key/value head when ``kv_heads`` is None.
        ffn: "swiglu" or "gelu".
        ffn_ratio: inner size of the feed-forward layer / width.
        tied: the readout shares the token embedding.
        qk_norm: RMSNorm on queries and keys.
        std: standard deviation of the initial weights at this width.

    Raises:
        RequestError: the heads do not fit the width.
    """

    width: int
    depth: int
    vocabulary: int
    head_dim: int | None = 16
    heads: int | None = None
    kv_heads: int | None = None
    kv_share: int = 1
    ffn: Literal["swiglu", "gelu"] = "swiglu"
    ffn_ratio: float = 2.0
    tied: bool = False
    qk_norm: bool = False
    std: float | None = None

    def __post_init__(self) -> None:
        if (self.head_dim is None) == (self.heads is None):
            raise RequestError("a transformer fixes either head_dim or heads: give one and leave the other empty.")
        unit, what = (self.head_dim, "head dim") if self.heads is None else (self.heads, "head count")
        if self.width % (unit or 1):
            raise RequestError(
                f"width {self.width} is not a multiple of the {what} {unit}: use a multiple of {unit}, or set another."
            )
        if self.n_heads % self.n_kv:
            raise RequestError(
                f"{self.n_heads} query heads cannot share {self.n_kv} key/value heads: make the first a multiple of the second."
            )
        if self.size_D % 2:
            raise RequestError(f"head dim {self.size_D} is odd, and rotary embeddings turn pairs: use an even one.")

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.heads or self.width // (self.head_dim or 1)

    @property
    def size_D(self) -> int:
        """Head dim."""
        return self.head_dim or self.width // (self.heads or 1)

    @property
    def n_kv(self) -> int:
        """Key/value heads."""
        return self.kv_heads or max(1, self.n_heads // self.kv_share)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.shape = shape
        self.q = nn.Linear(shape.width, shape.n_heads * shape.size_D, bias=False)
        self.k = nn.Linear(shape.width, shape.n_kv * shape.size_D, bias=False)
        self.v = nn.Linear(shape.width, shape.n_kv * shape.size_D, bias=False)
        self.out = nn.Linear(shape.n_heads * shape.size_D, shape.width, bias=False)
        self.q_norm = nn.RMSNorm(shape.size_D) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.size_D) if shape.qk_norm else nn.Identity()

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Map the normalized stream to what is added to it."""
        B, T, _ = x_BTC.shape
        D = self.shape.size_D
        q_BHTD = self.q(x_BTC).view(B, T, -1, D).transpose(1, 2)
        k_BGTD = self.k(x_BTC).view(B, T, -1, D).transpose(1, 2)
        v_BGTD = self.v(x_BTC).view(B, T, -1, D).transpose(1, 2)
        q_BHTD, k_BGTD = _rotate(self.q_norm(q_BHTD)), _rotate(self.k_norm(k_BGTD))
        grouped = self.shape.n_heads != self.shape.n_kv
        o_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=grouped)
        return self.out(o_BHTD.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2002.05202) or GELU."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        inner = int(shape.width * shape.ffn_ratio)
        self.up = nn.Linear(shape.width, inner, bias=False)
        self.gate = nn.Linear(shape.width, inner, bias=False) if shape.ffn == "swiglu" else None
        self.down = nn.Linear(inner, shape.width, bias=False)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Map the normalized stream to what is added to it."""
        up = self.up(x_BTC)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x_BTC)) * up)


class Block(nn.Module):
    """Attention and feed-forward, each normalized before and added to the residual stream."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.norm2 = nn.RMSNorm(shape.width)
        self.ffn = FeedForward(shape)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Map the residual stream ``[B, T, C]`` to itself."""
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC))
        return x_BTC + self.ffn(self.norm2(x_BTC))


class Transformer(nn.Module):
    """Language model: tokens ``[B, T]`` to logits ``[B, T, V]``.

    Weights start normal with std ``shape.std``, by default 1/√width for matrices and 1 for embeddings that are not tied.
    """

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(shape.width)
        self.readout = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.readout.weight = self.embedding.weight
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=shape.std or module.in_features**-0.5)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Map tokens ``[B, T]`` to logits ``[B, T, V]``."""
        x_BTC = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.readout(self.norm(x_BTC))


def _rotate(x_BHTD: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2104.09864) with base 10 000, halves paired."""
    T, D = x_BHTD.shape[-2:]
    frequency = 10_000 ** (-torch.arange(0, D, 2, device=x_BHTD.device, dtype=torch.float32) / D)
    angle = torch.arange(T, device=x_BHTD.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x_BHTD.dtype), angle.sin().to(x_BHTD.dtype)
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
