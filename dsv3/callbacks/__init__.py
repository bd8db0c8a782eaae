"""What happens around the training step, one concern per file.

`dsv3.build` lists them in the order that matters: EMA, records, validation, benchmarks, and last the
checkpoint, which therefore holds all that the others did at that step.
"""

from dsv3.callbacks.benchmarks import Benchmarks
from dsv3.callbacks.checkpoint import SaveCheckpoints
from dsv3.callbacks.ema import EMA
from dsv3.callbacks.interruption import Interruption
from dsv3.callbacks.progress import Progress
from dsv3.callbacks.record import Record
from dsv3.callbacks.validate import Validate

__all__ = ["EMA", "Benchmarks", "Interruption", "Progress", "Record", "SaveCheckpoints", "Validate"]
