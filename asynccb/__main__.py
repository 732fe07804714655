"""``python -m asynccb``."""

import sys

from asynccb.cli import main

if __name__ == "__main__":
    sys.exit(main())
