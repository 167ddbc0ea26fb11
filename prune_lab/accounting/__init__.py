"""Layers, what of them may be pruned, and what they cost in parameters and MACs; counted nowhere else."""
