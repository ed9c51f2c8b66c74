"""Built-in models: plain torch modules without any µP code.

Shape suffixes: B batch, T time, C width, H query heads, G key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from mutransfer.errors import BuildError

__all__ = ["MLP", "ResNet", "Transformer", "TransformerShape", "apply_rotary", "rotary_table"]


class MLP(nn.Module):
    """ReLU network with ``depth`` hidden layers of ``width`` units and torch's default initialization.

    Args:
        inputs: number of features of one example after flattening.
        width: number of units in each hidden layer.
        depth: number of hidden layers, at least 1.
        classes: number of logits.
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
    """Residual block: norm → relu → conv → norm → relu → conv, added to the residual stream."""

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
    """Pre-activation residual network (He et al. 1603.05027) with GroupNorm and one resolution per half of the blocks.

    Args:
        inputs: number of channels of the image.
        width: number of channels of every block, a multiple of the 8 normalization groups.
        depth: number of residual blocks; the image is downsampled by 2 once, in the middle.
        classes: number of logits.

    Raises:
        BuildError: if the width is not a multiple of the number of normalization groups.
    """

    def __init__(self, inputs: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        if width % GROUPS:
            raise BuildError(f"resnet's width {width} is not a multiple of its {GROUPS} norm groups: try {_up(width)}.")
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
    """Sizes of a transformer at one width.

    Exactly one of ``head_dim`` and ``heads`` is fixed. With a fixed head dim the number of heads grows with the width, as is
    usual today; with a fixed number of heads the head dim grows, and µP then requires 1/d attention.

    Args:
        width: size of the residual stream.
        depth: number of blocks.
        vocabulary: number of tokens.
        head_dim: size of one head, or None if ``heads`` is fixed.
        heads: number of query heads, or None if ``head_dim`` is fixed.
        kv_heads: number of key/value heads, a divisor of the number of query heads; None to use ``kv_share``.
        kv_share: number of query heads per key/value head if ``kv_heads`` is None.
        ffn: "swiglu" or "gelu".
        ffn_ratio: inner size of the feed-forward layer divided by the width.
        tied: whether the readout shares the weight of the token embedding.
        qk_norm: whether to apply RMSNorm to queries and keys.
        std: standard deviation of the initial weights at this width; None for the default of `Transformer`.

    Raises:
        BuildError: if the heads do not fit the width.
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
            raise BuildError("a transformer fixes either head_dim or heads: give one and set the other to None.")
        unit, what = (self.head_dim, "head dim") if self.heads is None else (self.heads, "head count")
        if self.width % (unit or 1):
            raise BuildError(
                f"width {self.width} is not a multiple of the {what} {unit}: use a multiple of {unit}, or another {what}."
            )
        if self.n_heads % self.n_kv:
            raise BuildError(
                f"{self.n_heads} query heads cannot share {self.n_kv} key/value heads: make the first a multiple of the second."
            )
        if self.size_D % 2:
            raise BuildError(f"head dim {self.size_D} is odd, but rotary embeddings rotate pairs: use an even one.")

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.heads or self.width // (self.head_dim or 1)

    @property
    def size_D(self) -> int:
        """Size of one head."""
        return self.head_dim or self.width // (self.heads or 1)

    @property
    def n_kv(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads or max(1, self.n_heads // self.kv_share)


class Attention(nn.Module):
    """Causal self-attention with rotary position embeddings and grouped queries."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.shape = shape
        self.q = nn.Linear(shape.width, shape.n_heads * shape.size_D, bias=False)
        self.k = nn.Linear(shape.width, shape.n_kv * shape.size_D, bias=False)
        self.v = nn.Linear(shape.width, shape.n_kv * shape.size_D, bias=False)
        self.out = nn.Linear(shape.n_heads * shape.size_D, shape.width, bias=False)
        self.q_norm = nn.RMSNorm(shape.size_D) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.size_D) if shape.qk_norm else nn.Identity()

    def forward(self, x_BTC: torch.Tensor, rotary_2TD: torch.Tensor) -> torch.Tensor:
        """Map the normalized residual stream ``[B, T, C]`` to the update that is added to the stream.

        ``rotary_2TD`` is the `rotary_table` of these positions.
        """
        B, T, _ = x_BTC.shape
        D = self.shape.size_D
        q_BHTD = self.q(x_BTC).view(B, T, -1, D).transpose(1, 2)
        k_BGTD = self.k(x_BTC).view(B, T, -1, D).transpose(1, 2)
        v_BGTD = self.v(x_BTC).view(B, T, -1, D).transpose(1, 2)
        q_BHTD, k_BGTD = (apply_rotary(each, rotary_2TD) for each in (self.q_norm(q_BHTD), self.k_norm(k_BGTD)))
        grouped = self.shape.n_heads != self.shape.n_kv
        o_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=grouped)
        return self.out(o_BHTD.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """Feed-forward layer with SwiGLU (Shazeer 2002.05202) or GELU."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        inner = int(shape.width * shape.ffn_ratio)
        self.up = nn.Linear(shape.width, inner, bias=False)
        self.gate = nn.Linear(shape.width, inner, bias=False) if shape.ffn == "swiglu" else None
        self.down = nn.Linear(inner, shape.width, bias=False)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Map the normalized residual stream ``[B, T, C]`` to the update that is added to the stream."""
        up = self.up(x_BTC)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x_BTC)) * up)


class Block(nn.Module):
    """Pre-norm block: attention, then a feed-forward layer, each added to the residual stream."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.norm2 = nn.RMSNorm(shape.width)
        self.ffn = FeedForward(shape)

    def forward(self, x_BTC: torch.Tensor, rotary_2TD: torch.Tensor) -> torch.Tensor:
        """Map the residual stream ``[B, T, C]`` to itself; ``rotary_2TD`` is the `rotary_table` of these positions."""
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC), rotary_2TD)
        return x_BTC + self.ffn(self.norm2(x_BTC))


class Transformer(nn.Module):
    """Causal language model that maps tokens ``[B, T]`` to logits ``[B, T, V]``.

    Linear weights are initialized from a normal distribution with std ``shape.std``, by default 1/√fan-in. An embedding that is
    not tied has torch's default std of 1.
    """

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.size_D = shape.size_D
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
        rotary_2TD = rotary_table(tokens_BT.shape[1], self.size_D, x_BTC.device).to(x_BTC.dtype)
        for block in self.blocks:
            x_BTC = block(x_BTC, rotary_2TD)
        return self.readout(self.norm(x_BTC))


def rotary_table(T: int, D: int, device: torch.device | None = None) -> torch.Tensor:
    """Return cosines and signed sines of rotary position embeddings (Su et al. 2104.09864) with base 10 000, ``[2, T, D]``."""
    frequency = 10_000 ** (-torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)
    angle = torch.arange(T, device=device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def apply_rotary(x_BHTD: torch.Tensor, rotary_2TD: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of dimension i and i + D/2 of each head by the angles of a `rotary_table`."""
    cos_TD, sin_TD = rotary_2TD
    return torch.addcmul(x_BHTD * cos_TD, x_BHTD.roll(x_BHTD.shape[-1] // 2, dims=-1), sin_TD)
