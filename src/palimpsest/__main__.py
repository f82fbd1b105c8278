"""`python -m palimpsest` is the command `palimpsest`."""

import sys

from palimpsest.cli import main

sys.exit(main())
