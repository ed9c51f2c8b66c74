"""A model's own initialization: watched in its constructor, kept as data, drawn again at any size and on any shard."""

from .draws import Init as Init
from .shards import draw_ as draw_
from .watcher import InitWatcher as InitWatcher

__all__ = ["Init", "InitWatcher", "draw_"]
