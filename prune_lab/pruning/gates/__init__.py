"""Learned gates: their distributions, layout, budgets and multipliers."""
