"""Training time and GPU hours from FLOPs, and the MFU implied by GPU hours.

    GPU hours = operations per token * tokens / (peak * MFU) / 3600        MFU = that, solved for it

MFU counts the model's operations (flops.py), so recomputation, bubbles and communication all lower it. `peak` is the
dense peak of one GPU in the format that MFU is stated against.
"""

SECONDS_PER_HOUR = 3600
HOURS_PER_DAY = 24


def gpu_hours(*, flops_per_token: float, tokens: float, peak: float, mfu: float) -> float:
    return flops_per_token * tokens / (peak * mfu) / SECONDS_PER_HOUR


def implied_mfu(*, flops_per_token: float, tokens: float, peak: float, hours: float) -> float:
    return flops_per_token * tokens / (peak * hours * SECONDS_PER_HOUR)


def days(hours: float, gpus: int) -> float:
    """Days on the clock of so many GPU hours on `gpus` GPUs."""
    return hours / gpus / HOURS_PER_DAY
