"""What happens around the training step, one concern per file.

`dsv3.build` lists them in the order that matters: EMA, records, monitoring, validation, benchmarks, and then
the checkpoint, which therefore holds all that they did at that step; what comes after only shows it.
"""

from dsv3.training.callbacks.ema import EMA
from dsv3.training.callbacks.expert_plots import Pictures
from dsv3.training.callbacks.guard import Guard
from dsv3.training.callbacks.interruption import Interruption
from dsv3.training.callbacks.monitor import Monitor
from dsv3.training.callbacks.progress import Progress
from dsv3.training.callbacks.quantisation import MeasureQuantisation
from dsv3.training.callbacks.record import Record
from dsv3.training.callbacks.run_benchmarks import Benchmarks
from dsv3.training.callbacks.save import SaveCheckpoints
from dsv3.training.callbacks.validate import Validate

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
