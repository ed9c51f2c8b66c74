"""What grows in a transformers config, by how much, and the config at another size.

A config is seen flat: ``text_config.hidden_size`` is a field of a nested config. `hf_infer` tells which fields grow.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from mutransfer.errors import RequestError
from mutransfer.scale import Scale

__all__ = ["Fields", "Whole", "flat", "resized", "told"]

Whole = int | list[int]


@dataclass(frozen=True)
class Fields:
    """What grows in one config, with its values there.

    Args:
        width: field → value; the first is the unit that a family's width counts in.
        depth: likewise; empty if the architecture has no number of layers.
        head_dims: (name, base, at double width) of every head dim that modules keep.
    """

    width: dict[str, Whole]
    depth: dict[str, Whole]
    head_dims: tuple[tuple[str, int, int], ...] = ()

    def between(self, base: Scale, target: Scale) -> dict[str, dict[str, tuple[Whole, Whole]]]:
        """Return (at base, at target) of every field that grows, as ``width``, ``depth`` and ``head_dim``."""
        old, new = self.at(base.width, base.depth), self.at(target.width, target.depth)
        heads: dict[str, tuple[Whole, Whole]] = {}
        for name, own, doubled in self.head_dims:
            sizes = [own * scale.width // self.size[0] if doubled > own else own for scale in (base, target)]
            heads[name] = sizes[0], sizes[1]
        return {
            "width": {name: (old[name], new[name]) for name in self.width},
            "depth": {name: (old[name], new[name]) for name in self.depth},
            "head_dim": heads,
        }

    @property
    def size(self) -> tuple[int, int]:
        """The config's own width and depth."""
        return _unit(self.width), _unit(self.depth) if self.depth else 1

    def at(self, width: int, depth: int) -> dict[str, Whole]:
        """Return every growing field's value at another width and depth.

        Raises:
            RequestError: one of them would not be whole, with the multiple that the width or depth must be of.
        """
        own_width, own_depth = self.size
        if depth != own_depth and not self.depth:
            raise RequestError(
                f"depth {depth}: the config has no field for its number of layers, so leave the depth out."
            )
        grown = {name: _times(name, value, "width", width, own_width, self.width) for name, value in self.width.items()}
        return grown | {
            name: _times(name, value, "depth", depth, own_depth, self.depth) for name, value in self.depth.items()
        }


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field of a config and of the configs nested in it."""
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def resized(config: dict[str, Any], changes: dict[str, Whole], depth: Container[str]) -> dict[str, Any]:
    """Return a copy of a config with ``changes`` to its flat fields; what is listed per layer follows those in ``depth``."""
    new = dict(config)
    for name, value in changes.items():
        if "." not in name:
            new[name] = value
            if name in depth and isinstance(value, int) and value != config[name]:
                for listed, layers in config.items():
                    per_layer = isinstance(layers, list) and (
                        "layer" in listed or all(isinstance(x, str) for x in layers)
                    )
                    if per_layer and len(layers) == config[name] and listed not in changes:
                        new[listed] = _relayered(layers, value)
    for folder in {name.partition(".")[0] for name in changes if "." in name}:
        inside = f"{folder}."
        inner = {name.removeprefix(inside): value for name, value in changes.items() if name.startswith(inside)}
        new[folder] = resized(config[folder], inner, {name for name in inner if inside + name in depth})
    return new


def _relayered(layers: list[Any], count: int) -> list[Any]:
    """Repeat a periodic stack; stretch one that is not, so that each kind of layer keeps its place and share."""
    period = next(p for p in range(1, len(layers) + 1) if all(a == b for a, b in zip(layers, layers[p:], strict=False)))
    if period <= len(layers) // 2:
        return [layers[i % period] for i in range(count)]
    return [layers[i * len(layers) // count] for i in range(count)]


def told(changes: dict[str, dict[str, tuple[Whole, Whole]]]) -> str:
    """Return what `Fields.between` found as one line."""

    def listed(kind: str) -> str:
        return ", ".join(
            f"{name} {old}→{new}" if old != new else f"{name} {old}" for name, (old, new) in changes[kind].items()
        )

    heads = [
        f"{name.replace('_', ' ')} {f'stays {old}' if old == new else f'grows {old}→{new}'}"
        for name, (old, new) in changes["head_dim"].items()
    ]
    return "; ".join([f"grows with width: {listed('width')}", *heads, f"depth: {listed('depth') or 'no field'}"])


def _times(name: str, value: Whole, axis: str, size: int, own: int, all_of_them: dict[str, Whole]) -> Whole:
    entries = value if isinstance(value, list) else [value]
    if any(entry * size % own for entry in entries):
        step = math.lcm(*(own // math.gcd(own, entry) for other in all_of_them.values() for entry in _entries(other)))
        odd = next(entry for entry in entries if entry * size % own)
        raise RequestError(
            f"{axis} {size} would make {name} {odd}·{size}/{own} = {odd * size / own:.4g}: use a multiple of {step}, or say "
            f"with --{axis}-field what is to grow."
        )
    grown = [entry * size // own for entry in entries]
    return grown if isinstance(value, list) else grown[0]


def _entries(value: Whole) -> list[int]:
    return value if isinstance(value, list) else [value]


def _unit(fields: dict[str, Whole]) -> int:
    return _entries(next(iter(fields.values())))[0]
