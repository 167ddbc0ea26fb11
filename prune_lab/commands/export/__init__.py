"""prune-lab export: a finished network as files for other runtimes, checked, and timed beside its dense form."""
