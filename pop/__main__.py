"""`python -m pop` is the `pop` command."""

import sys

from pop.cli import main
from pop.parallel import end, launched

if __name__ == "__main__":
    status = main()
    if launched()[1] > 1:
        end(status)
    sys.exit(status)
