"""``python -m twn_kernels`` is the same as the console script ``twn-kernels``."""

import sys

from twn_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
