"""What prune-lab costs, as ratios of things timed in turn: one file per section. Run by scripts/benchmark."""
