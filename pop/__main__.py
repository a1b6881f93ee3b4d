"""`python -m pop` is the `pop` command."""

import sys

from pop.backends.tensor_parallel import end, launched
from pop.cli.commands import main

if __name__ == "__main__":
    leave = end if launched()[1] > 1 else sys.exit
    leave(main())
