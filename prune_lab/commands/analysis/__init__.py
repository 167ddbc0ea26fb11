"""Analyses of finished runs: what lies between two networks, and how the loss curves around one. They change no run."""
