"""A folder of eight runs of 5,000 steps, one of them of DeepSeek-V3's size, two still being written: what the dashboard
must bear. `python -m tests.reporting.many_runs FOLDER` writes it."""

import sys
from pathlib import Path

from tests.reporting.made_up import MadeUpRun

RUNS, STEPS, PER_INTERVAL = 8, 5000, 12
BIG = "arm0/seed0"


def write_many_runs(root: Path) -> list[MadeUpRun]:
    """58 layers of 256 experts in the first run, 6 of 32 in the others; two of them are sick."""
    runs = []
    for number in range(RUNS):
        size = {"layers": 58, "experts": 256, "top_k": 8} if number == 0 else {"layers": 6, "experts": 32, "top_k": 4}
        sick_from, settings = 4000 if number in (0, 3) else None, {"router": {"top_k": 4 + number // 2}}
        path = root / f"arm{number // 2}" / f"seed{number % 2}"
        run = MadeUpRun(path, **size, seed=number, sick_from=sick_from, settings=settings)
        run.pairs_every = 100 * PER_INTERVAL  # of the big run, a part has four million numbers
        while run.steps < STEPS:
            run.interval(PER_INTERVAL)
        if number not in (0, 1):
            run.folder.write_summary({})
        runs.append(run)
    return runs


if __name__ == "__main__":
    write_many_runs(Path(sys.argv[1]))
