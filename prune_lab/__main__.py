"""python -m prune_lab."""

import sys

from prune_lab.cli import main

sys.exit(main())
