"""`python -m pop` is the `pop` command."""

import sys

from pop.cli import main

if __name__ == "__main__":
    status = main()
    from pop.backends.tensor_parallel import end, launched  # not before the command line has been read

    leave = end if launched()[1] > 1 else sys.exit
    leave(status)
