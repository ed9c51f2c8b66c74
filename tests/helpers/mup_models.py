"""The architectures of mup's MLP and Transformer examples, with mup and with mup left out, as a user's file has them.

`mutransfer check tests/helpers/mup_models.py:mlp --parametrization own` trains them as they stand: their own initial
weights, and mup's optimizer where mup has annotated the model.
"""

from __future__ import annotations

import math

import torch
from mup import MuReadout, set_base_shapes
from torch import nn
from torch.nn import functional as F

import mutransfer as mt

BASE, CLASSES, TOKENS = 64, 10, 64


class MLP(nn.Module):
    """Three layers without biases, tanh, a readout that starts at zero."""

    def __init__(self, width: int, with_mup: bool) -> None:
        super().__init__()
        readout = MuReadout if with_mup else nn.Linear
        self.fc_1 = nn.Linear(192, width, bias=False)
        self.fc_2 = nn.Linear(width, width, bias=False)
        self.fc_3 = readout(width, CLASSES, bias=False)
        for layer in (self.fc_1, self.fc_2):
            nn.init.kaiming_normal_(layer.weight, a=1, mode="fan_in")
        nn.init.zeros_(self.fc_3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc_3(torch.tanh(self.fc_2(torch.tanh(self.fc_1(x)))))


class Layer(nn.Module):
    """Attention with four heads whose dim grows, then a feed-forward layer; each sum is normalized. Queries start at zero."""

    def __init__(self, width: int, with_mup: bool) -> None:
        super().__init__()
        self.heads, self.with_mup = 4, with_mup
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in "qkvo")
        self.linear1, self.linear2 = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        for layer in (self.q, self.k, self.v, self.out, self.linear1, self.linear2):
            nn.init.normal_(layer.weight, std=width**-0.5)
        nn.init.zeros_(self.q.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, width = x.shape
        d = width // self.heads
        q, k, v = (part(x).view(b, t, self.heads, d).transpose(1, 2) for part in (self.q, self.k, self.v))
        scale = math.sqrt(BASE // self.heads) / d if self.with_mup else 1 / math.sqrt(d)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(b, t, width)))
        return self.norm2(x + self.linear2(torch.relu(self.linear1(x))))


class Transformer(nn.Module):
    """Embedding, sines as positions, two layers, a readout that starts at zero."""

    def __init__(self, width: int, with_mup: bool) -> None:
        super().__init__()
        self.encoder = nn.Embedding(TOKENS, width)
        angle = torch.arange(32.0)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000) / width))
        self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], 2).flatten(1))
        self.layers = nn.ModuleList(Layer(width, with_mup) for _ in range(2))
        self.decoder = (MuReadout if with_mup else nn.Linear)(width, TOKENS, bias=False)
        nn.init.zeros_(self.decoder.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.encoder(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.decoder(x)


def family(model: type[nn.Module], with_mup: bool) -> mt.Family:
    """Return the model at any width, annotated against its base where mup is in it."""

    def build(scale: mt.Scale) -> nn.Module:
        built = model(scale.width, with_mup)
        if with_mup:
            # Attributes on the base's tensors are all that mup takes of it.
            set_base_shapes(built, model(BASE, True), delta=model(2 * BASE, True))
            # mup rescales what it finds; its own init functions do not, so the widths' weights are drawn afresh.
            built.load_state_dict(_fresh(model, scale.width))
        return built

    generator = torch.Generator().manual_seed(0)
    if model is MLP:
        batch = torch.randn(16, 192, generator=generator), torch.randint(CLASSES, (16,), generator=generator)
    else:
        tokens = torch.randint(TOKENS, (4, 17), generator=generator)
        batch = tokens[:, :-1], tokens[:, 1:]
    name = f"{model.__name__.lower()}{'' if with_mup else ' without mup'}"
    return mt.Family(build, batch, loss, mt.Scale(BASE, 2), name)


def _fresh(model: type[nn.Module], width: int) -> dict[str, torch.Tensor]:
    return model(width, True).state_dict()


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


mlp, transformer = family(MLP, True), family(Transformer, True)
plain_mlp, plain_transformer = family(MLP, False), family(Transformer, False)
