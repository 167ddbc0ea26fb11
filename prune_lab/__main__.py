"""python -m prune_lab."""

import sys

from prune_lab.cli.command import main

sys.exit(main())
