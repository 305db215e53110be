"""`python -m sdops` is `sdops`."""

import sys

from sdops.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
