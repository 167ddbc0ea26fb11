"""Pruning that depends on the input."""
