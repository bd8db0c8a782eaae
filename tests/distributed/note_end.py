"""A program for `run.on_end`: adds a line with the words after the first to the file that the first names."""

import sys
from pathlib import Path

with Path(sys.argv[1]).open("a") as file:
    print(*sys.argv[2:], file=file)
