"""The coordinate check: how the size of every module's output, and of its change, moves with width.

`record` measures, `verdict` judges. The measure is the same for every parametrization: the slopes of width-stable
feature learning (`tables.HEALTHY`), so the standard parametrization fails it, as it should.
"""

from .recording import record as record
from .verdicts import MARGIN as MARGIN
from .verdicts import Verdict as Verdict
from .verdicts import verdict as verdict

__all__ = ["MARGIN", "Verdict", "record", "verdict"]
