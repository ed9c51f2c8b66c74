"""Record a model's own initialization in its constructor, store it as data, and draw it at any size and on any shard."""

from .infer import InitTracer as InitTracer
from .init import Init as Init
from .init import draw_ as draw_

__all__ = ["Init", "InitTracer", "draw_"]
