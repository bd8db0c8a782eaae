"""`python -m dsv3 <tool> key=value ...`, or `dsv3 <tool> ...` where the environment is active."""

import sys

from dsv3.runtime import interruptible


def run() -> None:
    """The command `dsv3`."""
    with interruptible():
        from dsv3.cli import main

        sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
