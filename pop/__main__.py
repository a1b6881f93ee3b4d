"""`python -m pop` is the `pop` command."""

import sys

from pop.cli import main

if __name__ == "__main__":
    sys.exit(main())
