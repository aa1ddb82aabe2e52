# SPDX-License-Identifier: Apache-2.0
"""`python -m sola_vision` runs the command line `sola`."""

import sys

from sola_vision.cli import main

if __name__ == "__main__":
    sys.exit(main())
