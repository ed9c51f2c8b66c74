"""The built-in models: plain torch modules that know nothing of µP."""

from .mlp import MLP
from .resnet import ResNet
from .transformer import Transformer

__all__ = ["MLP", "ResNet", "Transformer"]
