"""`python -m data <tool> key=value ...`"""

import sys

from dsv3.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], package="data.tools"))
