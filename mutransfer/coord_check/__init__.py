"""The coordinate check: how the size of every module's output, and of its change, moves with width.

`record` measures, `verdict` judges. The measure is the same for every parametrization: the slopes of width-stable
feature learning (`tables.HEALTHY`), so the standard parametrization fails it, as it should.
"""

from .check import PATIENCE as PATIENCE
from .check import Check as Check
from .check import judge as judge
from .recording import OWN as OWN
from .recording import record as record
from .verdicts import MARGIN as MARGIN
from .verdicts import Verdict as Verdict
from .verdicts import verdict as verdict

__all__ = ["MARGIN", "OWN", "PATIENCE", "Check", "Verdict", "judge", "record", "verdict"]
