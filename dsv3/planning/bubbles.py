"""Pipeline schedules: bubbles, and multiples of parameters and activations (report, Table 2).

    schedule   bubble                          parameters   activations
    1F1B       (PP - 1) (F + B)                1x           PP
    ZB1P       (PP - 1) (F + B - 2 W)          1x           PP
    DualPipe   (PP / 2 - 1) (F&B + B - 3 W)    2x           PP + 1

Activations are in units of what one micro-batch keeps in one stage. The bubble's share is of the whole step,
bubble / (bubble + busy), where busy is M (F + B), or M F&B in DualPipe, for M micro-batches.
"""

from typing import NamedTuple

from dsv3.planning.recipe import ChunkTimes, PipelineSchedule

PIPELINES: tuple[PipelineSchedule, ...] = ("1f1b", "zb1p", "dualpipe")


class Pipeline(NamedTuple):
    bubble: float  # in the unit of the chunk times
    share: float  # of the step's time
    parameters: int  # multiple of a stage's parameters that a GPU holds
    activations: int  # micro-batches' worth of a stage's activations that a GPU holds


def pipeline_costs(schedule: PipelineSchedule, *, pp: int, num_microbatches: int, times: ChunkTimes) -> Pipeline:
    """Raises ValueError for DualPipe with an odd number of stages."""
    f, b, w, fb = times
    if schedule == "dualpipe":
        if pp % 2:
            raise ValueError(f"pp={pp}: must be even: DualPipe pairs stages")
        return _costs((pp // 2 - 1) * (fb + b - 3 * w), num_microbatches * fb, 2, pp + 1)
    chunk = f + b if schedule == "1f1b" else f + b - 2 * w
    return _costs((pp - 1) * chunk, num_microbatches * (f + b), 1, pp)


def _costs(bubble: float, busy: float, parameters: int, activations: int) -> Pipeline:
    return Pipeline(bubble, bubble / (bubble + busy), parameters, activations)
