"""Analyses of finished runs: the path between two networks, and the curvature of the loss. They change no run."""
