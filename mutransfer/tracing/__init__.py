"""What every parameter of a model is for: seen in a forward pass and in builds of other sizes, not guessed from names."""

from .observe import observe as observe
from .specs import Observation as Observation
from .specs import ParamSpec as ParamSpec

__all__ = ["Observation", "ParamSpec", "observe"]
