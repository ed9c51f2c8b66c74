"""A model's own initialization: recorded in its constructor, kept as data, and drawn again at any size and on any shard."""

from .draw import draw_ as draw_
from .infer import InitWatcher as InitWatcher
from .init import Init as Init

__all__ = ["Init", "InitWatcher", "draw_"]
