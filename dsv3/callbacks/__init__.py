"""What happens around the training step, one concern per file.

`dsv3.build` lists them in the order that matters: EMA, records, monitoring, validation, benchmarks, and then
the checkpoint, which therefore holds all that they did at that step; what comes after only shows it.
"""

from dsv3.callbacks.benchmarks import Benchmarks
from dsv3.callbacks.checkpoint import SaveCheckpoints
from dsv3.callbacks.ema import EMA
from dsv3.callbacks.guard import Guard
from dsv3.callbacks.interruption import Interruption
from dsv3.callbacks.monitor import Monitor
from dsv3.callbacks.pictures import Pictures
from dsv3.callbacks.progress import Progress
from dsv3.callbacks.quantisation import MeasureQuantisation
from dsv3.callbacks.record import Record
from dsv3.callbacks.validate import Validate

__all__ = [
    "EMA",
    "Benchmarks",
    "Guard",
    "Interruption",
    "MeasureQuantisation",
    "Monitor",
    "Pictures",
    "Progress",
    "Record",
    "SaveCheckpoints",
    "Validate",
]
