"""A model's own initialization: recorded in its constructor, kept as data, and drawn again at any size and on any shard."""

from .infer import InitWatcher as InitWatcher
from .init import Init as Init
from .init import draw_ as draw_

__all__ = ["Init", "InitWatcher", "draw_"]
