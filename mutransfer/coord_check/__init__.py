"""Coordinate check: how large each module's output is, and its change during training, as the width grows.

`record` measures sizes (the mean of |x|) and `verdict` judges their slopes. The criterion is the same for every
parametrization: the slopes of width-stable feature learning (`tables.HEALTHY`). The standard parametrization therefore
fails, as it should.
"""

from .check import PATIENCE as PATIENCE
from .check import Check as Check
from .check import judge_coordinates as judge_coordinates
from .recording import OWN as OWN
from .recording import record as record
from .verdicts import MARGIN as MARGIN
from .verdicts import Verdict as Verdict
from .verdicts import verdict as verdict

__all__ = ["MARGIN", "OWN", "PATIENCE", "Check", "Verdict", "judge_coordinates", "record", "verdict"]
