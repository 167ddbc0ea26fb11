"""Layers, their eligibility for pruning, and their cost in parameters and MACs; counted nowhere else."""
