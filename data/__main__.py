"""`python -m data <tool> key=value ...`"""

import sys

from dsv3.runtime import interruptible

if __name__ == "__main__":
    with interruptible():
        from dsv3.cli import main

        sys.exit(main(sys.argv[1:], package="data.tools"))
