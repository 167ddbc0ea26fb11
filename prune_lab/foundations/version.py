"""Version of prune-lab."""

from __future__ import annotations

__version__ = "0.1.0"
